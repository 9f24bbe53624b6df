"""Which method learns fastest: a queue of runs, what each measured, and a report made from the rows alone.

    statistics   intervals over seeds and examples, paired differences, theory of E|cos|
    settings     the models and tasks by name, loaded ready to train
    plan         the runs, smallest informative set first: a pure function of what is known so far
    queue        waiting, running, done, failed in SQLite; several workers, each of which may be killed
    meter        forwards as a run really makes them
    first_order  what the methods are measured against: Adam on the same C, Adam on a LoRA
    nets         what zo-finetuner has learned on another task
    work         one run from its spec to its row
    measures     gradients against directions: cosines, captured energy, finite differences, precision
    report       report.md and figures from the rows

The unit of cost is a forward: one sequence through all blocks of the model (see `meter`).
"""
