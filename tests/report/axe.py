"""axe-core, which finds faults by WCAG 2.1 A and AA; tests that need it are skipped where it is missing."""

from pathlib import Path

import pytest

AXE = Path(__file__).parents[2] / "node_modules/axe-core/axe.min.js"
needs_axe = pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: `npm install --no-save axe-core@4.14.1` gets it")


def violations(page):
    """What axe-core finds in a page: its rule and the elements. Checks that it looked at contrast and labels."""
    # The page's own policy lets no script in: this one comes as if from the developer tools.
    page.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text()})
    found = page.driver.execute_async_script(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}).then(arguments[0])"
    )
    assert {"color-contrast", "label"} <= {each["id"] for each in found["passes"]}
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
