"""`tessera chaos`: a seeded campaign of strikes against a run, started the way a user starts it, and what it cost.

The run is trained twice in folders of its own: once undisturbed, once struck again and again, each time started again
with the same command. What was left behind is then held against the laws. The seed decides who is struck, when and
how; nothing in the run knows that it is watched: the moments are read from its files and its requests.

plan      which strikes a seed means             attempt   one start of the launcher, and its processes
points    moments of a run, seen from outside    storage   full disks, damaged shards, a proxy before S3
campaign  the two runs, strike after strike      laws      what must hold afterwards
report    what it cost                           proxy     what it does to requests
"""
