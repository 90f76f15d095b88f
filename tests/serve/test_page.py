"""The built-in page in a real browser, without a window."""

import contextlib
import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve.fake_engine import FakeEngine
from tests.serve.live import live, wait_until


@contextlib.contextmanager
def browsing(*arguments):
  """A headless Chromium that logs what the console says."""
  browser = shutil.which("chromium")
  driver = shutil.which("chromedriver")
  if browser is None or driver is None:
    reason = "no chromium and chromedriver (Debian: chromium, chromium-driver)"
    if os.environ.get("JAXHEADS_REQUIRE_BROWSER"):
      pytest.fail(reason)
    pytest.skip(reason)
  options = webdriver.ChromeOptions()
  options.binary_location = browser
  for argument in (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"),
    *("--disable-gpu", "--window-size=1300,900", *arguments),
  ):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  service = webdriver.ChromeService(driver)
  chrome = webdriver.Chrome(options, service)
  try:
    yield chrome
  finally:
    chrome.quit()


@pytest.fixture(scope="module")
def chrome():
  with browsing() as chrome:
    yield chrome


@pytest.fixture
def page(chrome):
  engine = FakeEngine(turn_s=0.03)
  with live(engine) as server:
    chrome.get(f"{server.url}/")
    text_of(chrome, "status", "ready")
    yield chrome, server
    chrome.get("about:blank")


def find(chrome, name):
  return chrome.find_element(By.ID, name)


def text_of(chrome, name, expected):
  wait_until(lambda: expected in find(chrome, name).text)


def fill(chrome, **values):
  for name, value in values.items():
    chrome.execute_script(
      "const field = document.getElementById(arguments[0]);"
      "field.value = arguments[1];"
      "field.dispatchEvent(new Event('input'));",
      name,
      value,
    )


def heads(chrome):
  """The label of every head, by layer."""
  return [
    [
      head.get_attribute("aria-label")
      for head in row.find_elements(By.CLASS_NAME, "head")
    ]
    for row in chrome.find_elements(By.CSS_SELECTOR, "#grid tbody tr")
  ]


def test_a_completion_streams_and_heads_show_what_they_keep(page):
  chrome, server = page
  fill(chrome, prompt="abcdefghij", temperature=0, tokens=60, budget=75)
  assert find(chrome, "budget-shown").text == "75 %"
  find(chrome, "send").click()
  text_of(chrome, "log", "the cat")
  wait_until(lambda: heads(chrome))
  shown = heads(chrome)
  assert [len(row) for row in shown] == [4, 4, 4]
  # Half of the layer's heads are full, the others keep half of the prompt.
  kinds = [[label.split(",")[1].split()[-1] for label in row] for row in shown]
  assert kinds == [
    ["full", "full", "compressed", "compressed"],
    ["full", "compressed", "compressed", "compressed"],
    ["full", "full", "compressed", "compressed"],
  ]
  text_of(chrome, "usage", "10 tokens read, 75 % kept; 60 written")
  assert find(chrome, "asked").text == "75 %"
  assert "mat; né, 😀 x" in find(chrome, "log").text
  request = server.engine.submitted[-1]
  assert request.budget == 0.75
  assert request.params.max_tokens == 60
  # What was seen last stays.
  text_of(chrome, "which", "Last seen")
  assert len(heads(chrome)) == 3
  assert not [
    entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"
  ]


def test_a_chat_by_keyboard_alone(page):
  chrome, server = page
  fill(chrome, temperature=0, tokens=20, prompt="")
  chat = chrome.find_element(By.CSS_SELECTOR, "input[value=chat]")
  completion = chrome.find_element(By.CSS_SELECTOR, "input[value=completion]")
  completion.send_keys(Keys.ARROW_RIGHT)
  assert chat.is_selected()
  chat.send_keys(Keys.TAB, Keys.TAB)
  for said in ("Hi", "More"):
    find(chrome, "prompt").send_keys(said, Keys.ENTER)
    wait_until(lambda: find(chrome, "send").is_enabled())
  prompt = bytes(server.engine.submitted[-1].prompt).decode()
  answer = "the cat sat on the m"
  assert prompt == f"user: Hi\nassistant: {answer}\nuser: More\nassistant:"
  # Escape stops.
  fill(chrome, tokens=150)
  find(chrome, "prompt").send_keys("Long", Keys.ENTER)
  wait_until(lambda: len(server.engine.submitted) == 3)
  find(chrome, "prompt").send_keys(Keys.ESCAPE)
  wait_until(lambda: server.engine.cancelled)
  assert find(chrome, "send").is_enabled()
  assert find(chrome, "alert").text == ""


def test_errors_are_told(page):
  chrome, _ = page
  fill(chrome, prompt="x" * 300)
  find(chrome, "send").click()
  text_of(chrome, "alert", "context is 256 tokens")
  # Text of a model is text.
  fill(chrome, prompt="<img src=x onerror=alert(1)>", tokens=5)
  find(chrome, "send").click()
  text_of(chrome, "log", "<img src=x")
  assert not chrome.find_elements(By.CSS_SELECTOR, "#log img")


def test_the_page_needs_nothing_from_elsewhere(page):
  chrome, server = page
  _, headers, text = server.ask("GET", "/")
  assert "default-src 'none'" in headers["content-security-policy"]
  assert "http://" not in text and "https://" not in text
  loaded = chrome.execute_script(
    "return performance.getEntriesByType('resource').map(e => e.name)"
  )
  assert all(name.startswith(server.url) for name in loaded)
  # Every field has a name that a screen reader can say.
  for field in chrome.find_elements(By.CSS_SELECTOR, "input, textarea, button"):
    assert field.accessible_name
