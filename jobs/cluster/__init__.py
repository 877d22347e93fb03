"""Ray, at the edge of a job.

`connection`: joining a cluster, or starting a local Ray. `resources`: what workers ask for, and what there is.
`placement`: room on nodes, asked for and given back. `waiting`: until there is room for all workers. `events`: what all
processes say, in order, in the driver. `stop_bell`: telling all workers to stop. `tasks`: functions in other processes.
`errors`: what Ray raises, as users see it.
"""
