// A browser starts no worker from a page that was opened as a file. The site's search is one, so there it runs in a
// hidden frame instead, with the messages that a worker would have.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.title = "search"
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = async (...scripts) => {
        for (const script of scripts) await this.load(script)
      }
      this.frame = frame
      this.loaded = this.load(url)
    }

    load(url) {
      const inside = this.frame.contentDocument
      return new Promise((done, failed) => {
        const script = inside.createElement("script")
        script.onload = done
        script.onerror = failed
        script.src = url
        inside.body.append(script)
      })
    }

    postMessage(data) {
      this.loaded.then(() => {
        const inside = this.frame.contentWindow
        inside.dispatchEvent(new inside.MessageEvent("message", { data }))
      })
    }
  }
}
