"""Trials of a search that train together, in one process per GPU, over one base.

lockstep.py  trials in threads, which meet at each step
trainer.py   the training engine of one trial, whose gradients come from there
listening.py transcribing, for all trials that have the same clips before them
once.py      what several trials need, made by the first that asks
engine.py    what they share; a runner of trials
actor.py     one of these as a Ray actor, and the runner in a trial's driver that talks to it
"""
