"""Other libraries: each module here imports its library only when one of its functions is called."""
