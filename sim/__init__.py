"""Everything with a process, a disk or a screen: the Flower apps, the runners, the command line, reports."""
