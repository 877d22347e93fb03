"""Trials of a search that train together, in one process per GPU, over one base.

lockstep.py   trials in threads, which meet at each step
trainer.py    the training engine of one trial, whose steps are made there
listening.py  transcribing, for all trials that have the same clips before them
validating.py their loss on those clips
room.py       how many clips at once, and what to do where memory is short
once.py       what several trials need, made by the first that asks
engine.py     what they share; a runner of trials
actor.py      one of these as a Ray actor, and the runner in a trial's driver that talks to it
"""
