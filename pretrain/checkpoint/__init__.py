"""Sharded checkpoints, committed by a manifest that is written last; nothing in them executes.

ROOT is RUN/checkpoints, or a folder or s3:// prefix of its own (`train.checkpoints`). ROOT/step-S.attempt-A/ holds
    rRRRRR.safetensors  of each rank: float32 slices [lo, hi) of flattened parameters and AdamW moments, and buffers;
                        beyond 1 GiB it goes on in rRRRRR.part-PPPPP.safetensors
    index.json          where every slice lies: what a reader needs to ask for its byte ranges alone
    state.json          step, position, parameter groups by name, update counts, loss scale, what the run is and
                        depends on, and what was changed on its way
    MANIFEST.json       name, size and sha256 of every file, created once and last: without it there is no checkpoint
ROOT/attempt-AAAAA.json is the claim of an attempt, with the settings it was told to change: the highest one owns the
run, the commits of earlier ones are refused. ROOT/name-NAME.json keeps a checkpoint from retention. Slices carry their
intervals, so any number of ranks at any ZeRO stage reads what any other wrote. Generator states are not saved: all
randomness is a function of (seed, position).

catalog   names, manifests, digests, retention, claims     layout    slices -> files, byte ranges -> slices
saver     ranks write together, beside training            restore   a checkpoint -> the engine
identity  the settings a checkpoint is bound to            trained   a checkpoint -> a model; partial load
verbs     what `tessera checkpoint` does                   universal export to DeepSpeed's universal layout
resume    may a run go on from it                          fingerprints  of vocabulary, tokenizer, weights, data
"""
