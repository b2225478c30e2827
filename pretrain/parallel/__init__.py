"""How ranks share the work: `settings` says it, `start` begins it, `strategy` is what the trainer speaks to.

settings -> nothing of torch.distributed, so that launchers and tables read it without waiting
strategy    Parallel: one process alone, and DDP; fsdp2 and zero: the strategies that cut the model up
deepspeed_files  what zero saves, read without the engine
start       the one file that knows all strategies
timing      where a step's seconds go; watchdog: which rank holds the others up
"""
