"""A client app for workers: real training, in which one client gets its worker into trouble."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from sim import client_app

app = ClientApp()
app.query()(client_app.who)


@app.query("pid")
def pid(message: Message, context: Context) -> Message:
    """The worker, the number of turns so far, and what the run config says."""
    turns = context.state.get("turns", ConfigRecord({"n": 0}))["n"] + 1
    context.state["turns"] = ConfigRecord({"n": turns})
    return Message(RecordDict({"it": ConfigRecord({"pid": os.getpid(), "turn": turns, **context.run_config})}), reply_to=message)


@app.query("up")
def up(message: Message, context: Context) -> Message:
    """The worker; slow enough that no worker answers for all."""
    time.sleep(0.2)
    return Message(RecordDict({"it": ConfigRecord({"pid": os.getpid()})}), reply_to=message)


@app.query("sees")
def sees(message: Message, context: Context) -> Message:
    """The worker, and the GPUs that it may use; slow enough that no worker answers for all."""
    time.sleep(0.5)
    it = {"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "all")}
    return Message(RecordDict({"it": ConfigRecord(it)}), reply_to=message)


@app.query("echo")
def echo(message: Message, context: Context) -> Message:
    return Message(RecordDict(dict(message.content)), reply_to=message)


@app.query("sleep")
def sleep(message: Message, context: Context) -> Message:
    time.sleep(float(message.content["config"]["seconds"]))
    return Message(RecordDict(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Partition 1 gets its worker into the trouble that the run config names: once, or each time."""
    how, flag = str(context.run_config["how"]), Path(str(context.run_config["flag"]))
    if context.node_config["partition-id"] == 1 and (not flag.exists() or how.startswith("always")):
        flag.touch()
        if how in ("killed", "always killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "leaves":
            os._exit(3)
        elif how == "hangs":
            time.sleep(600)
        elif how.endswith("out of memory"):
            resource.setrlimit(resource.RLIMIT_DATA, (2**31, resource.RLIM_INFINITY))
            torch.ones(2**30)  # 4 GiB
        elif how == "raises":
            raise OSError("the disk is full")
    return client_app.train(message, context)
