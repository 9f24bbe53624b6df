"""`python -m zoact_kernels`: what this installation is and what it can run. Needs nothing but the core."""

from __future__ import annotations

from .backend import environment


def main() -> None:
    about = environment()
    width = max(map(len, about))
    for name, value in about.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
