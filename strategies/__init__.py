"""Flower strategies, and the one place where updates become Flower records and back."""

from strategies.data_free import DataFree, Method
from strategies.fedavg import FedAvg
from strategies.federation import Federation
from strategies.watch import Cost, Nobody, Watch

__all__ = ["Cost", "DataFree", "FedAvg", "Federation", "Method", "Nobody", "Watch"]
