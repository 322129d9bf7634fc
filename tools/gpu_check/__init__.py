"""Everything that only a card can tell, in a few minutes: `python -m tools.gpu_check` (`make
gpu-check`).

Read in this order: stages (what is run, and for how long at most), __main__ (the driver: one
process group a stage, a deadline for all), worker (what runs inside that process), results (what is
written down), expectations (what we believe beforehand, and our goals), report (the table). Then
one module a stage, most valuable first: machine, ceilings, kernels, engine, rates, decode,
training, head, learning, profilers. Beside them: models and rooflines (shapes, bytes, FLOPs).

What can be done for a card where there is none: bundle (what it will need), walk (which kernels the
project launches), dry_run (all stages on a fake device) and peak (what an update takes of a card's
memory). Those three rest on fake_cuda, recorder, fake_ops, host_values, memory, graph and launches;
dry_run and peak on stand_ins, too.

Departures from a test suite: a stage that fails, hangs or floods its output costs its own figures
and nothing else; figures are written as they come, so that a lease that ends early still leaves
what was measured until then.
"""
