"""What every run of a study needs: imported once, in the process that all of them are forked from. It starts no thread and asks no GPU."""

from sim.environment import quiet

quiet()

import matplotlib.figure  # noqa: E402, F401 - the environment must be set before Flower or PyTorch read it
import PIL.Image  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401 - the first optimiser of a process imports it, which takes two seconds

import sim.local  # noqa: E402, F401
import sim.plots  # noqa: E402, F401
import sim.report  # noqa: E402, F401
