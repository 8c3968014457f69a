"""Sharded checkpoints, committed by a manifest that is written last. They contain no executable code.

ROOT is RUN/checkpoints, or a separate folder or s3:// prefix (`train.checkpoints`). ROOT/step-S.attempt-A/ holds
    rRRRRR.safetensors  per rank: float32 slices [lo, hi) of flattened parameters and AdamW moments, and buffers;
                        more than 1 GiB is continued in rRRRRR.part-PPPPP.safetensors
    index.json          location of every slice, so that a reader requests only the byte ranges it needs
    state.json          step, position, parameter groups by name, update counts, loss scale, identity, fingerprints
                        and consented changes of the run
    MANIFEST.json       name, size and sha256 of every file, created once and last: without it there is no checkpoint
ROOT/attempt-AAAAA.json is the claim of an attempt, with the changes of settings it was started with. The highest
attempt owns the run; commits of earlier ones are refused. ROOT/name-NAME.json protects a checkpoint from retention.
Slices carry their intervals, so any number of ranks at any ZeRO stage can read what any other wrote. Random generator
states are not saved: all randomness is a function of (seed, position).

catalog   names, manifests, digests, retention, claims     layout    slices -> files, byte ranges -> slices
saver     distributed, asynchronous saves                  restore   a checkpoint -> the engine
identity  the settings a checkpoint is bound to            trained   a checkpoint -> a model; partial load
verbs     the `tessera checkpoint` commands                universal export to DeepSpeed's universal layout
resume    checks before a run is resumed                   fingerprints  of vocabulary, tokenizer, weights, data
"""
