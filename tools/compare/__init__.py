"""The parts of tools/fio_compare.py and tools/icount_gate.py.

jobs (one fio run) and backings (where files lie) and subjects (what is compared) make the cells of
a profile; runner measures them; results holds, saves and merges what came out; stats, tables, goals
and pictures show it; guest runs it all on a kernel that has the driver.
"""
