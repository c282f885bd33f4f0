"""Headless Chromium for tests of the HTML pages; they are skipped where there is none."""

import json
import shutil
import time

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


def chromium_driver(profile, *, webgl=False):
    """A driver of Chromium, with a profile in this folder; a generator, for a fixture. WebGL is drawn in software."""
    if not (BROWSER and DRIVER):
        pytest.skip(
            "no Chromium with its chromedriver on this machine: Debian has them as chromium and chromium-driver"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    drawing = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader") if webgl else ("--disable-gpu",)
    for flag in (*FLAGS, *drawing, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Page:
    """A page that was opened, and short ways to ask it."""

    def __init__(self, driver, address, *, width=1366, height=900, theme="light"):
        self.driver = driver
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        driver.get(address)
        self.settle()

    def settle(self):
        """Wait until what is chosen is drawn."""

    def run(self, script):
        return self.driver.execute_script(script)

    def find(self, name):
        return self.driver.find_element("id", name)

    def wait_until(self, script):
        """Wait until a script gives something true."""
        end = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < end, f"never came: {script}"
            time.sleep(0.02)

    def choose(self, name, value):
        from selenium.webdriver.support.ui import Select

        Select(self.find(name)).select_by_value(value)
        self.settle()

    def press(self, name, *keys):
        self.find(name).send_keys(*keys)
        self.settle()

    def requests(self):
        """The addresses that were asked for since the page was opened, but for pictures inside the page.

        A new browser may still load its own first page (`chrome:`) meanwhile.
        """
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url for url in asked if not url.startswith(("data:", "chrome:"))}

    def console(self):
        return self.driver.get_log("browser")
