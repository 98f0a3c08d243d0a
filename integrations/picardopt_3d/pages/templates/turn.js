/* One angle for the whole page: the slider, the film's views and the object show the scene from the same side. */
"use strict";

const turn = {
  azimuth: 0, // of the camera, degrees from the front
  listeners: [],
  to(degrees) {
    this.azimuth = ((degrees % 360) + 360) % 360;
    for (const listener of this.listeners) listener(this.azimuth);
  },
  by(degrees) {
    this.to(this.azimuth + degrees);
  },
  follow(listener) {
    this.listeners.push(listener);
    listener(this.azimuth);
  },
};

/** Calls `moved(dx, dy)` while one pointer drags an element, and `pinched(factor)` while two do. */
function onDrag(element, moved, pinched) {
  const pointers = new Map();
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return Math.hypot(a.x - b.x, a.y - b.y) || 1;
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = pointers.size === 2 ? spread() : 0;
    const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (pointers.size === 1) moved(dx, dy);
    else if (pointers.size === 2 && pinched) pinched(before / spread());
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
    element.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }
}

for (const strip of document.querySelectorAll(".strip[data-views]")) {
  const picture = strip.querySelector("img");
  const { views, columns } = strip.dataset;
  const rows = Math.ceil(views / columns);
  turn.follow((azimuth) => {
    const index = Math.round((azimuth / 360) * views) % views;
    const across = (100 * (index % columns)) / columns;
    const down = (100 * Math.floor(index / columns)) / rows;
    picture.style.transform = `translate(${-across}%, ${-down}%)`;
  });
  onDrag(strip, (dx) => turn.by(-dx * 0.6));
}

const slider = document.getElementById("turn");
if (slider) {
  const shown = document.getElementById("angle");
  slider.addEventListener("input", () => turn.to(Number(slider.value)));
  turn.follow((azimuth) => {
    const degrees = Math.round(azimuth) % 360;
    if (Number(slider.value) !== degrees) slider.value = degrees;
    slider.setAttribute("aria-valuetext", `${degrees} degrees`);
    shown.textContent = `${degrees}°`;
  });
}

const play = document.getElementById("play");
if (play) {
  let last = null;
  const frame = (now) => {
    if (play.getAttribute("aria-pressed") !== "true") return (last = null);
    if (last !== null) turn.by((30 * Math.min(now - last, 100)) / 1000);
    last = now;
    requestAnimationFrame(frame);
  };
  play.addEventListener("click", () => {
    const playing = play.getAttribute("aria-pressed") !== "true";
    play.setAttribute("aria-pressed", String(playing));
    play.textContent = playing ? "Stop" : "Spin";
    if (playing) requestAnimationFrame(frame);
  });
}
