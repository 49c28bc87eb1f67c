"""The HTTP service: runs in one folder, listed, followed, submitted and controlled (`docs/service.md`).

    client ── HTTP ──► limits ──► auth ──► routes ──► run folders on disk       what is, and what was asked
                                                            ▲
                                       a thread: the queue ─┴──► Ray's Job API  starting and ending a run's process

The service keeps no state of its own: what it says of a run it reads from the run's folder, so it can be ended at any
time, and started again. It imports no Ray: a Ray that dies takes its clients' processes with it.
"""
