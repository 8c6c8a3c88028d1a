"""Impressions of single client models, on the server: mined once, kept, and sent on as tensors."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedimpr import seeds
from fedimpr.devices import placed
from fedimpr.distillation import mine
from fedimpr.impressions import Bank, Source
from fedimpr.observation import compiled
from fedimpr.states import under
from fedimpr.synthesis.base import label
from strategies.data_free import Method
from strategies.federation import Federation
from strategies.keep import Part
from strategies.watch import Cost


class Mined:
    """One method's impressions of the models of M clients.

    Args:
        federation: whose server mines.
        name: of the method.
        method: it mines its number of images from each model, and remembers nothing from one to the next.
        most: clients whose models are mined, at most.
    """

    def __init__(self, federation: Federation, name: str, method: Method, most: int) -> None:
        self.federation, self.name, self.method = federation, name, method
        self.bank = Bank(method.mining.capacity * most)
        self.answers = torch.zeros(0)  # (len(bank), K): what each model says to its own impressions
        self.spent = torch.zeros(3, dtype=torch.float64)  # seconds, images, images through a teacher

    def mine(self, round: int, clients: Sequence[int], models: Sequence[nn.Module]) -> None:
        """Mine all models; what is done is kept after each, so that a run that was stopped goes on with the next."""
        fed, part = self.federation, Part(self.federation.keep, round, self.part)
        done = 0
        if saved := part.load():
            self.bank.load_state_dict({key: value.to(fed.device) for key, value in under(saved, "bank/").items()})
            self.spent, done = saved["spent"], int(saved["done"])
        for place in range(done, len(models)):
            start, client = time.monotonic(), clients[place]
            with compiled(fed.compile):
                passes = mine(
                    placed(models[place], fed.device),
                    copy.deepcopy(self.method.synthesizer),
                    mining=self.method.mining,
                    bank=self.bank,
                    source=Source(f"client {client}", self.name, round, fed.seed),
                    shape=fed.shape,
                    generator=seeds.generator(fed.seed, f"server/{self.name}", round, client),
                    progress=functools.partial(self._told, client),
                )
            self.spent = self.spent + torch.tensor([time.monotonic() - start, self.method.mining.images, passes], dtype=torch.float64)
            bank = {f"bank/{key}": value for key, value in self.bank.state_dict().items()}
            part.save({**bank, "spent": self.spent, "done": torch.tensor(place + 1)})
        held, origins = self.bank.images, self.bank.state_dict()["origins"]
        self.answers = torch.empty(len(held), self.bank.targets.shape[1])
        for place, model in enumerate(models):  # asked anew: while it was mined its answers were at another temperature
            chosen = (origins == place).cpu()
            self.answers[chosen] = label(placed(model, fed.device), held[chosen.to(held.device)], 1.0).cpu()

    def _told(self, client: int, stage: str, done: int, total: int, **info: object) -> None:
        self.federation.watch.progress(f"{stage} {self.name} of client {client}", done, total, **info)

    def beside(self) -> dict[str, Tensor]:
        """What :class:`fedimpr.adaptation.SourceImpressions` is made of, by name; a model's number is its place among those mined."""
        held = self.bank.state_dict()
        return {"pixels": held["images"].cpu(), "targets": self.answers, "origins": held["origins"].cpu()}

    @property
    def part(self) -> str:
        """The part of a round that keeps what is mined."""
        return f"impressions by {self.name}"

    @property
    def cost(self) -> Cost:
        """Of all that was mined."""
        seconds, images, passes = self.spent.tolist()
        return Cost(seconds, int(images), seconds, int(passes), int(passes))

    def state_dict(self) -> dict[str, Tensor]:
        """All of it."""
        return {"answers": self.answers, "spent": self.spent, **{f"bank/{key}": value for key, value in self.bank.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.answers, self.spent = state["answers"], state["spent"]
        self.bank.load_state_dict({key: value.to(self.federation.device) for key, value in under(state, "bank/").items()})
