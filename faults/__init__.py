"""The fault suite: what can go wrong is made to go wrong, and deft has to get through it.

Each fault is a module, named by its id:

    TITLE                           what goes wrong
    FIGURE                          points that the whole suite throws
    run(scale: Scale) -> Result     throws them
    control() -> Result             the same with the protection taken away, which must not pass
"""

import os

# Before torch is imported: fresh processes and forked ones then sum in the same order.
os.environ["OMP_NUM_THREADS"] = "1"
