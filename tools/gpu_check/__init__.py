"""Checks in a few minutes all that needs a card: `python -m tools.gpu_check` (`make gpu-check`).

Read in this order: stages (what is run, and for how long at most), __main__ (the driver: one
process group for each stage, one deadline for all), worker (the code inside such a process),
results (the file of results), expectations (predictions and goals), report (the table). Then one
module for each stage, most valuable first: machine, ceilings, kernels, engine, attention, training,
rates, decode, head, batch, learning, profilers. Beside them: models (shapes) and rooflines (bytes
and FLOPs).

    __main__ --starts--> worker STAGE --calls--> PARTS of STAGE.py --Check.figure--> results.jsonl
                                                                                         |
                                                                     report.md <---------+

Four modules prepare for a card on a machine without one: bundle (files to take along), walk (the
kernels that the project launches), dry_run (all stages on a fake device) and peak (the memory of an
update). The last three use fake_cuda, recorder, fake_ops, host_values, memory, graph and launches;
dry_run and peak also use stand_ins.

Departures from a test suite: a stage that fails, hangs or floods its output loses its own figures
only. Figures are written as they come, so if the machine is taken away early, those measured until
then are kept.
"""
