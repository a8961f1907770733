"""The panel behind its token, over the network's own words: requests, polling, a browser."""

import urllib.error
import urllib.request

import pytest
from panel_process import needs_chromium, open_browser, start

pytest.importorskip("playwright")
pytest.importorskip("nicegui")

pytestmark = needs_chromium


def test_without_the_token_nothing_comes(tmp_path):
    process, address = start(tmp_path, "--host", "0.0.0.0", "--token", "correct-horse")
    try:
        for wrong in ("", "/?token=wrong-horse", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(address + wrong)
        with open_browser() as browser:
            page = browser.new_context().new_page()
            page.goto(f"{address}/?token=correct-horse&tab=Memory Optimization")
            page.get_by_text("Estimated VRAM of training").wait_for()
            assert "correct-horse" not in page.url
            page.reload()
            page.get_by_text("Estimated VRAM of training").wait_for()
    finally:
        process.terminate()
        process.wait(90)
