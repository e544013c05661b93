"""Asynchrony around a worker step that it takes as an opaque function.

| module        | what lives there                                                                     |
|---------------|--------------------------------------------------------------------------------------|
| `whole_files` | files that are there as a whole or not at all                                           |
| `logs`        | rows that are only added at the end, in memory or in a file                            |
| `records`     | what is logged: who made each update, and every episode                                |
| `parameters`  | `SharedParameters`, the store: parameters, optimizer state and version under one lock  |
| `signals`     | how Ctrl-C and SIGTERM end a run                                                       |
| `thread_pools` | how many threads XLA and the linear algebra library compute with                      |
| `turns`       | limits how many threads run at once                                                    |
| `threads`     | `WorkerThreads`: each pulls, steps and applies, again and again                        |
| `metrics`     | exact counters, the log of episodes, what a sink is, and the progress bar              |
| `json_lines`  | a sink that appends rows to a file                                                     |
| `sinks`       | sinks for TensorBoard, Weights & Biases and trackio                                    |
| `objects`     | what a run was given as an object, by name                                             |
| `trees`       | a tree as arrays with names, to be saved, checked and restored                         |
| `checkpoint_files` | one consistent moment of a whole run in one file, written all or nothing           |
| `checkpoints` | when to save one, which to keep, which to go on from                                 |
| `evaluation`  | whole episodes by a fixed policy                                                       |
| `loading`     | `load`: what a run has learnt, ready to act                                            |
| `program`     | `build`: what a configuration describes, compiled once and run often                   |
| `step_process` | what runs in a process that only makes steps of workers                              |
| `ray_cluster` | the connection to a Ray cluster                                                        |
| `ray_nodes`   | a step process on Ray, and what each machine does, for metrics                         |
| `ray_workers` | steps in processes of their own, on one machine or many, by Ray                        |
| `result`      | `TrainResult`: what a run leaves behind                                                |
| `run`         | one run of a program: what `train` and `replay` have in common                         |
| `reporting`   | what a run shows and saves while it goes on                                            |
| `training`    | `train`: runs a program in worker threads                                              |
| `replaying`   | `replay`: repeats a run in one thread, bit for bit                                     |
| `schedules`   | schedules made without a run: round-robin, fixed and random delays, a straggler        |
| `simulation_result` | `SimulationResult`: what a simulated run leaves behind                           |
| `simulation`  | `make_simulation`: a whole run with any schedule as one compiled program             |

Each module imports only from those above it; a test holds the table to that.
"""
