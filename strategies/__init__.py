"""Flower strategies, and the one place where updates become Flower records and back."""

from strategies.adapting import Adapting
from strategies.continual import Continual
from strategies.data_free import DataFree, Method
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff
from strategies.federation import Federation
from strategies.watch import Bill, Charge, Cost, Nobody, Watch

__all__ = ["Adapting", "Bill", "Charge", "Continual", "Cost", "DataFree", "FedAvg", "FedBuff", "Federation", "Method", "Nobody", "Watch"]
