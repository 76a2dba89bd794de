// What tests/support/browser.py asks of a page. Evaluated in the page; gives window.__page.
(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
  const pen = canvas.getContext("2d", { willReadFrequently: true })
  const known = new Map()

  // Red, green, blue in 0..255 and alpha in 0..1 of any color that CSS can write.
  function color(text) {
    if (!known.has(text)) {
      pen.clearRect(0, 0, 1, 1)
      pen.fillStyle = text
      pen.fillRect(0, 0, 1, 1)
      const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data
      known.set(text, [r, g, b, a / 255])
    }
    return known.get(text)
  }

  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1)

  // WCAG 2.2, "relative luminance" and "contrast ratio".
  const luminance = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const c = rgb[i] / 255
    return sum + weight * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  }, 0)
  function ratio(a, b) {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x)
    return (high + 0.05) / (low + 0.05)
  }

  function path(element) {
    const parts = []
    for (let e = element; e && e !== document.body && parts.length < 4; e = e.parentElement) {
      const name = e.getAttribute("class")?.trim().split(/\s+/)[0]
      parts.unshift(e.localName + (e.id ? `#${e.id}` : name ? `.${name}` : ""))
      if (e.id) break
    }
    return parts.join(" > ")
  }

  const shown = e => e.checkVisibility({ opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true })

  // Shapes of an SVG that were painted before a text and lie under its middle.
  function shapesUnder(text) {
    const box = text.getBoundingClientRect()
    const found = []
    for (const shape of text.ownerSVGElement.querySelectorAll("rect,path,circle,ellipse,polygon")) {
      if (!(shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING) || !shown(shape)) continue
      const style = getComputedStyle(shape)
      if (style.fill === "none" || style.fill.startsWith("url(")) continue
      const matrix = shape.getScreenCTM()
      if (!matrix) continue
      const middle = new DOMPoint(box.x + box.width / 2, box.y + box.height / 2).matrixTransform(matrix.inverse())
      if (!shape.isPointInFill(middle)) continue
      const [r, g, b, a] = color(style.fill)
      found.push([r, g, b, a * style.fillOpacity * style.opacity])
    }
    return found
  }

  // What is behind an element, or null where a picture is: that is for eyes to judge.
  function background(element, svg) {
    const layers = svg ? shapesUnder(element).reverse() : []
    for (let e = svg ? element.ownerSVGElement : element; e; e = e.parentElement) {
      const style = getComputedStyle(e)
      if (style.backgroundImage !== "none" && !(layers.some(layer => layer[3] === 1))) return null
      layers.push(color(style.backgroundColor))
    }
    return layers.reduceRight((below, layer) => over(layer, below), sheet())
  }

  // What the browser itself paints behind everything: white, or dark where the page has a dark scheme.
  function sheet() {
    const probe = document.body.appendChild(document.createElement("i"))
    probe.style.backgroundColor = "Canvas"
    const found = color(getComputedStyle(probe).backgroundColor)
    probe.remove()
    return found
  }

  function opacity(element) {
    let product = 1
    for (let e = element; e; e = e.parentElement) product *= getComputedStyle(e).opacity
    return product
  }

  // Every visible text whose contrast is below the minimum.
  function lowContrast(minimum) {
    const found = []
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
      const text = walker.currentNode.data.trim()
      const element = walker.currentNode.parentElement
      if (!text || ["SCRIPT", "STYLE", "NOSCRIPT", "TEMPLATE"].includes(element.tagName) || !shown(element)) continue
      const range = document.createRange()
      range.selectNodeContents(walker.currentNode)
      const box = range.getBoundingClientRect()
      if (box.width < 2 || box.height < 2 || element.closest("[disabled],[inert],title,desc,defs")) continue
      const style = getComputedStyle(element)
      const svg = element.ownerSVGElement != null
      const behind = background(element, svg)
      if (behind === null) continue
      const [r, g, b, a] = color(svg ? style.fill : style.color)
      const contrast = ratio(over([r, g, b, a * opacity(element) * (svg ? style.fillOpacity : 1)], behind), behind)
      if (contrast < minimum) found.push(`${contrast.toFixed(2)} ${path(element)}: ${text.slice(0, 40)}`)
    }
    return [...new Set(found)]
  }

  // Elements that reach beyond the right edge of the window and are not inside something that scrolls or cuts.
  function tooWide() {
    const edge = document.documentElement.clientWidth
    const held = e => {
      for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
        if (getComputedStyle(p).overflowX !== "visible") return true
      return false
    }
    return [...document.body.querySelectorAll("*")]
      .filter(e => shown(e) && e.getBoundingClientRect().width > 0 && e.getBoundingClientRect().right > edge + 1 && !held(e))
      .map(e => `${path(e)} ends at ${Math.round(e.getBoundingClientRect().right)} of ${edge} px`)
  }

  const FOCUSABLE = "a[href],area[href],button,input,select,textarea,summary,iframe,audio[controls],video[controls],[tabindex],[contenteditable]"

  // What a keyboard has to reach: one of each group of radio buttons.
  function focusable() {
    const groups = new Set()
    return [...document.querySelectorAll(FOCUSABLE)].filter(e => {
      if (e.tabIndex < 0 || e.disabled || e.type === "hidden" || e.closest("[inert]")) return false
      if (!e.checkVisibility({ visibilityProperty: true, contentVisibilityAuto: true })) return false
      if (e.type !== "radio") return true
      const group = `${e.form?.id}/${e.name}`
      return !groups.has(group) && groups.add(group)
    })
  }

  const LOOKS = ["outlineStyle", "outlineWidth", "outlineColor", "boxShadow", "backgroundColor", "borderColor", "color", "textDecorationLine", "stroke", "strokeWidth"]
  function look(element) {
    // A box that is made invisible, to be drawn by what follows it, is judged by that.
    const drawnByNext = element.localName === "input" && (getComputedStyle(element).opacity === "0" || element.offsetWidth < 2)
    const style = getComputedStyle(drawnByNext && element.nextElementSibling || element)
    const without = style.outlineStyle === "none" ? ["outlineWidth", "outlineColor"] : []
    return LOOKS.filter(name => !without.includes(name)).map(name => style[name]).join()
  }

  // Begins at the top of the page; after each press of Tab, `reached` takes note of what has the focus.
  let stops = []
  function begin() {
    document.documentElement.append(Object.assign(document.createElement("style"),
      { textContent: "*,*::before,*::after{transition:none!important;animation:none!important}" }))
    document.activeElement?.blur()
    getSelection().removeAllRanges()
    stops = []
  }
  function reached() {
    const e = document.activeElement
    if (!e || e === document.body || e === document.documentElement || stops.some(stop => stop.e === e)) return false
    stops.push({ e, look: look(e) })
    return true
  }
  function end() {
    document.activeElement?.blur()
    const name = e => `${path(e)}: ${(e.getAttribute("aria-label") || e.innerText || e.title || e.value || "").trim().slice(0, 40)}`
    const radio = e => e.type === "radio" && stops.some(stop => stop.e.name === e.name)
    return {
      reached: stops.map(stop => name(stop.e)),
      missed: focusable().filter(e => !radio(e) && !stops.some(stop => stop.e === e)).map(name),
      unmarked: stops.filter(stop => look(stop.e) === stop.look).map(stop => name(stop.e)),
    }
  }

  window.__page = { lowContrast, tooWide, begin, reached, end, focusable: () => focusable().length }
})()
