"""A real browser, told what to do by Selenium."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


class Browser:
    """Chromium with the page open; ``requests`` are those that pages from disk made, ``errors`` what the console says."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
        for flag in (*flags, "disable-component-update", "disable-sync", f"user-data-dir={profile}", "window-size=1200,900"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.requests: list[str] = []
        self.errors: list[str] = []

    def open(self, path: Path) -> None:
        self.driver.get(path.as_uri())

    def look(self, *, width: int = 1200, dark: bool = False) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def listen(self) -> None:
        """Take up what happened since the last time."""
        self.errors += [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent" and message["params"]["documentURL"].startswith("file:"):
                self.requests.append(message["params"]["request"]["url"])

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def column(self, name: str) -> list[str]:
        """The cells of a column of the table, from top to bottom, as far as they are shown."""
        return self.js(
            """const table = document.querySelector("table.results");
            const place = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === arguments[0]);
            return [...table.tBodies[0].rows].filter(row => row.offsetParent).map(row => row.cells[place].textContent);""",
            name,
        )

    def head(self, name: str) -> Any:
        return next(cell for cell in self.driver.find_elements("css selector", "table.results th[scope=col]") if cell.text == name)
