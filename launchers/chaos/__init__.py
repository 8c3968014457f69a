"""`tessera chaos`: fault injection. A seeded campaign of strikes against a run started the way a user starts it.

The run is trained twice, in separate folders: once undisturbed (the reference), once struck repeatedly and restarted
each time with the same command. The results are then checked against the laws, and the cost is reported. The seed
decides target, time and kind of each strike. The run has no hooks: its progress is observed in its files and requests.

plan      the strikes that follow from a seed    attempt   one start of the launcher, and its processes
points    progress of a run, seen from outside   storage   full disks, damaged shards, a proxy before S3
campaign  the two runs and all strikes           laws      invariants checked afterwards
report    cost of the strikes                    proxy     faults injected into requests
"""
