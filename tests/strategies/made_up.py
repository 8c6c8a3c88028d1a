"""A device whose times are easy to reckon with."""

from __future__ import annotations

from strategies.devices import Device

# A million multiply-accumulates a second; 8 and 4 Mbit/s, which are a million and half a million bytes.
PLAIN = Device(
    name="plain",
    source="made up",
    share=1.0,
    macs_per_second=1e6,
    memory_mb=1.0,
    down_mbits=8.0,
    up_mbits=4.0,
    availability=1.0,
    dropout=0.0,
)
