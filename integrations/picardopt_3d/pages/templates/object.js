/* The object, drawn by WebGL 2 and turned by drag, wheel, touch and keys. `mesh.js` and `splats.js` draw it. */

/** Unpacks the arrays of the page: base64 of zlib, one after the other, each on a multiple of four bytes. */
async function unpack(object) {
  const packed = Uint8Array.from(atob(object.packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const kinds = { u1: Uint8Array, i1: Int8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
  const arrays = {};
  for (const { name, kind, offset, length } of object.arrays) {
    arrays[name] = new kinds[kind](bytes, offset, length);
  }
  return arrays;
}

function program(gl, vertex, fragment) {
  const linked = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, `#version 300 es\nprecision highp float;\n${source}`);
    gl.compileShader(shader);
    gl.attachShader(linked, shader);
  }
  gl.linkProgram(linked);
  if (!gl.getProgramParameter(linked, gl.LINK_STATUS) && !gl.isContextLost()) {
    throw new Error(gl.getProgramInfoLog(linked) || "a shader cannot be compiled");
  }
  return linked;
}

/** The camera: about the origin, z up, upright, at first where the film was taken from. */
function orbit(home) {
  const most = 89;
  return {
    elevation: home.elevation,
    distance: home.distance,
    lift(degrees) {
      this.elevation = Math.min(most, Math.max(-most, this.elevation + degrees));
    },
    zoom(factor) {
      this.distance = Math.min(4 * home.distance, Math.max(0.3 * home.distance, this.distance * factor));
    },
    reset() {
      this.elevation = home.elevation;
      this.distance = home.distance;
      turn.to(0);
    },
    /** Axes of the camera in the world, and pixels of its focal length. */
    pose(width, height) {
      const [up, around] = [(this.elevation * Math.PI) / 180, (turn.azimuth * Math.PI) / 180];
      const [cu, su, ca, sa] = [Math.cos(up), Math.sin(up), Math.cos(around), Math.sin(around)];
      return {
        right: [-sa, ca, 0],
        above: [-su * ca, -su * sa, cu],
        backward: [cu * ca, cu * sa, su],
        distance: this.distance,
        focal: (0.5 * Math.min(width, height)) / Math.tan((home.fov * Math.PI) / 360),
      };
    },
  };
}

/** Column-major matrix from the world to clip space. */
function worldToClip({ right, above, backward, distance, focal }, width, height) {
  const [near, far] = [0.05 * distance, 10 * distance];
  const [x, y] = [(2 * focal) / width, (2 * focal) / height];
  const [a, b] = [(far + near) / (near - far), (2 * far * near) / (near - far)];
  const columns = [0, 1, 2].map((i) => [x * right[i], y * above[i], a * backward[i], -backward[i]]);
  return new Float32Array([...columns.flat(), 0, 0, -a * distance + b, distance]);
}

async function showObject(canvas, object) {
  const gl = canvas.getContext("webgl2", { antialias: true, premultipliedAlpha: true });
  if (!gl) throw new Error("this browser shows no 3D (WebGL 2)");
  const camera = orbit(object.view);
  const arrays = await unpack(object);
  const make = object.kind === "mesh" ? meshPainter : splatPainter;
  let paint = await make(gl, object, arrays);
  let waiting = false;
  const draw = () => {
    waiting = false;
    if (gl.isContextLost()) return;
    const { width, height } = canvas;
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const mode = document.querySelector("input[name=look]:checked")?.value ?? "colour";
    paint(camera.pose(width, height), width, height, mode);
    canvas.dataset.drawn = Number(canvas.dataset.drawn ?? 0) + 1;
  };
  const redraw = () => {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  };
  new ResizeObserver(() => {
    const scale = Math.min(window.devicePixelRatio || 1, 2);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * scale));
    draw(); // at once: a resized canvas is empty
  }).observe(canvas);
  turn.follow(redraw);
  control(canvas, camera, redraw);
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", async () => {
    paint = await make(gl, object, arrays);
    redraw();
  });
}

function control(canvas, camera, redraw) {
  const change = (what) => (what(), redraw());
  onDrag(
    canvas,
    (dx, dy) => change(() => (turn.by(-dx * 0.5), camera.lift(dy * 0.5))),
    (factor) => change(() => camera.zoom(factor)),
  );
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 16 : 1;
      change(() => camera.zoom(Math.exp(Math.max(-90, Math.min(90, event.deltaY * lines)) * 0.002)));
    },
    { passive: false },
  );
  const keys = {
    ArrowLeft: () => turn.by(5),
    ArrowRight: () => turn.by(-5),
    ArrowUp: () => camera.lift(-5),
    ArrowDown: () => camera.lift(5),
    "+": () => camera.zoom(1 / 1.1),
    "=": () => camera.zoom(1 / 1.1),
    "-": () => camera.zoom(1.1),
    Home: () => camera.reset(),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    change(keys[event.key]);
  });
  document.getElementById("reset").addEventListener("click", () => change(keys.Home));
  for (const look of document.querySelectorAll("input[name=look]")) look.addEventListener("change", redraw);
}

const stage = document.querySelector("canvas");
if (stage) {
  const object = JSON.parse(document.getElementById("object").textContent);
  showObject(stage, object).catch((error) => {
    stage.hidden = true;
    const trouble = document.getElementById("trouble");
    trouble.textContent = `The object cannot be shown: ${error.message}. The film's views turn all the same.`;
    trouble.hidden = false;
  });
}
