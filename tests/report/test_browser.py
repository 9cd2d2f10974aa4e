"""The page in headless Chromium: it renders, and obeys mouse and keyboard."""

import shutil

import pytest

# Starting a browser takes seconds, and rendering a few more.
pytestmark = pytest.mark.slow

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
DRIVER = shutil.which('chromedriver')


@pytest.fixture(scope='module')
def browser():
  if not CHROMIUM or not DRIVER:
    pytest.skip('no chromium with chromedriver (apt install chromium-driver)')
  webdriver = pytest.importorskip('selenium.webdriver')
  from selenium.webdriver.chrome.service import Service

  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for name in (
    'headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'disable-gpu',
    'disable-background-networking',
  ):  # fmt: skip
    options.add_argument(f'--{name}')
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  opened = webdriver.Chrome(options=options, service=Service(DRIVER))
  yield opened
  opened.quit()


@pytest.fixture
def look(browser):
  """Opens a page; fails at the end if the console holds an error."""

  def opened(path, *, width=1200, dark=False):
    scheme = 'dark' if dark else 'light'
    browser.execute_cdp_cmd(
      'Emulation.setDeviceMetricsOverride',
      {'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': False},
    )
    browser.execute_cdp_cmd(
      'Emulation.setEmulatedMedia',
      {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]},
    )
    browser.get(path.absolute().as_uri())
    return browser

  yield opened
  assert browser.get_log('browser') == []


@pytest.fixture(scope='module')
def pages(narrowed, branched, tmp_path_factory, make_run, narrowing_rows):
  from maskconnect_jax.run import report
  from maskconnect_jax.study import report as study_report

  runs = tmp_path_factory.mktemp('many')
  for seed in (0, 1):
    make_run(runs / f'seed{seed}', rows=narrowing_rows, seed=seed, summary={})
  return {
    'blocks': report.write(narrowed),
    'branches': report.write(branched),
    'study': study_report.write([runs]),
  }


def css(browser, selector):
  from selenium.webdriver.common.by import By

  return browser.find_elements(By.CSS_SELECTOR, selector)


def press(browser, *keys):
  from selenium.webdriver.common.action_chains import ActionChains

  ActionChains(browser).send_keys(*keys).perform()


@pytest.mark.parametrize('name', ['blocks', 'branches', 'study'])
@pytest.mark.parametrize('width', [1200, 360])
def test_nothing_is_wider_than_the_window(look, pages, name, width):
  browser = look(pages[name], width=width)
  wide = browser.execute_script('return document.documentElement.scrollWidth')
  assert wide <= width
  drawn = [one for one in css(browser, 'svg, .strip') if one.is_displayed()]
  assert len(drawn) >= 3
  assert all(one.size['width'] > 100 for one in drawn)


# The colour of every text that is shown, and that of what lies behind it. A
# canvas turns any notation of a colour into numbers, and lays a colour that is
# not opaque over what is behind it.
TEXTS = """
const canvas = document.createElement('canvas').getContext(
  '2d', {willReadFrequently: true});
const laid = (colors) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const [color, opacity] of colors) {
    canvas.globalAlpha = opacity;
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
  }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const paper = getComputedStyle(document.body).backgroundColor;
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const own = walk.currentNode.parentElement;
  const box = document.createRange();
  box.selectNodeContents(walk.currentNode);
  if (!walk.currentNode.data.trim() || own.closest('script, style')) continue;
  own.scrollIntoView({block: 'center'});
  const {left, top, width, height} = box.getBoundingClientRect();
  if (!width || !own.checkVisibility()) continue;
  const x = left + width / 2, y = top + height / 2;
  const behind = [[paper, 1]];
  for (const one of document.elementsFromPoint(x, y).reverse()) {
    const style = getComputedStyle(one);
    if (/^(rect|circle)$/.test(one.tagName)) {
      if (style.fill !== 'none') behind.push([style.fill, style.opacity]);
    } else if (!one.closest('svg')) behind.push([style.backgroundColor, 1]);
  }
  const style = getComputedStyle(own);
  const ink = own.closest('svg') ? style.fill : style.color;
  found.push([
    walk.currentNode.data.trim(), laid([...behind, [ink, 1]]), laid(behind)]);
}
return found;
"""


def luminance(color):
  """As the Web Content Accessibility Guidelines 2.1 define it."""
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in (value / 255 for value in color)
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize('name', ['blocks', 'branches', 'study'])
@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_all_text_has_contrast(look, pages, name, width, dark):
  """WCAG's 4.5, against what lies behind the text."""
  browser = look(pages[name], width=width, dark=dark)
  for fold in css(browser, 'summary'):
    fold.click()
  texts = browser.execute_script(TEXTS)
  shown = [text for text, _, _ in texts]
  assert {'stem', 'head', 'stage 2', '9' if name != 'branches' else '8'} <= {
    *shown
  }
  assert (luminance(texts[0][2]) < 0.1) == dark
  pale = []
  for text, ink, behind in texts:
    low, high = sorted((luminance(ink), luminance(behind)))
    ratio = (high + 0.05) / (low + 0.05)
    if ratio < 4.5:
      pale.append((text, round(ratio, 2), ink, behind))
  assert not pale


def test_pointing_at_a_block_shows_what_it_reads(look, pages):
  from selenium.webdriver.common.action_chains import ActionChains

  browser = look(pages['blocks'])
  (node,) = css(browser, '.broad .node[data-node="4"]')
  ActionChains(browser).move_to_element(node).perform()
  (line,) = css(browser, '.about-node')
  assert line.text == (
    'Block 4, stage 2. Reads 1 (r = 1.00), 3 (r = 1.00). Read by 5, 6, 7.'
  )
  into = css(browser, '.broad .edge.in')
  assert {edge.get_attribute('data-from') for edge in into} == {'1', '3'}


def test_the_slider_moves_the_mask(look, pages, narrowed):
  import numpy as np
  from selenium.webdriver.common.keys import Keys

  browser = look(pages['blocks'])
  with np.load(narrowed / 'real_masks.npz') as file:
    masks = file['masks']
  read = """return [...document.querySelectorAll('.masks .cell')].map(
    (cell) => Number(cell.style.getPropertyValue('--r')))"""
  below = np.tril_indices(9)
  (slider,) = css(browser, '#step')
  np.testing.assert_allclose(browser.execute_script(read), masks[2][below])
  fills = {cell.value_of_css_property('fill') for cell in css(browser, '.cell')}
  assert len(fills) >= 3
  for at in (1, 0):
    slider.send_keys(Keys.ARROW_LEFT)
    np.testing.assert_allclose(browser.execute_script(read), masks[at][below])
  (shown,) = css(browser, '#step-at')
  assert shown.text == '10'
  assert slider.get_attribute('aria-valuetext') == 'step 10'


@pytest.mark.parametrize('name', ['blocks', 'branches'])
def test_the_keyboard_reaches_everything(look, pages, name):
  from selenium.webdriver.common.keys import Keys

  browser = look(pages[name])
  reached = []
  for _ in range(60):
    press(browser, Keys.TAB)
    active = browser.switch_to.active_element
    reached.append(
      active.get_attribute('id')
      or (active.get_attribute('class') or active.tag_name).split()[0]
    )
    if reached[-1] == 'node' and reached.count('node') == 1:
      press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
      second = browser.switch_to.active_element.get_attribute('data-node')
      (line,) = css(browser, '.about-node')
      assert second == ('2' if name == 'blocks' else '1.2')
      assert line.text.startswith(('Block 2,', 'Branch 1.2,'))
    if reached[-1] == 'matrix' and reached.count('matrix') == 1:
      press(browser, Keys.ARROW_DOWN)
      (line,) = css(browser, '.about-cell')
      cell = (
        'Block 2, source stem' if name == 'blocks' else 'Branch 2.2, source 1.1'
      )
      assert line.text.startswith(cell)
      assert 'after step 40' in line.text
    if reached[-1] == 'body':
      break
  assert reached.count('node') == 1
  assert reached.count('step') == 1
  assert reached.count('matrix') == (1 if name == 'blocks' else 5)
  folds = [e for e in css(browser, 'summary') if e.is_displayed()]
  assert reached.count('summary') == len(folds) >= 2
