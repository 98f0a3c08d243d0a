/* 3D Gaussians (arXiv 2308.04079): a quad each, as large as it is seen, drawn from the farthest to the nearest. */

const ACROSS = 512; // Gaussians in a row of the table, three texels each

async function splatPainter(gl, object, arrays) {
  const shader = program(
    gl,
    `uniform highp sampler2D table; uniform mat3 turned; uniform float distance_, focal, blur; uniform vec2 pixels;
    in vec2 corner; in uint index;
    out vec2 away; out vec4 painted;
    vec4 entry(int part) {
      return texelFetch(table, ivec2(3 * int(index % ${ACROSS}u) + part, index / ${ACROSS}u), 0);
    }
    void main() {
      vec4 first = entry(0), second = entry(1), third = entry(2);
      vec3 seen = turned * first.xyz - vec3(0.0, 0.0, distance_);
      float depth = -seen.z, opacity = first.w;
      gl_Position = vec4(0.0, 0.0, 2.0, 1.0); // nothing, unless it is before the camera
      if (depth < 0.05 * distance_ || opacity < 1.0 / 255.0) return;
      mat3 spread = turned * mat3(second.xyz, second.y, second.w, third.x, second.z, third.x, third.y)
        * transpose(turned);
      vec3 x = focal / depth * vec3(1.0, 0.0, seen.x / depth), y = focal / depth * vec3(0.0, 1.0, seen.y / depth);
      float xx = dot(x, spread * x) + blur, xy = dot(x, spread * y), yy = dot(y, spread * y) + blur;
      float middle = 0.5 * (xx + yy), radius = length(vec2(0.5 * (xx - yy), xy));
      vec2 along = abs(xy) > 1e-6 * middle ? normalize(vec2(xy, middle + radius - xx)) : vec2(xx >= yy, xx < yy);
      vec2 reach = sqrt(2.0 * log(255.0 * opacity) * vec2(middle + radius, max(middle - radius, 0.0)));
      vec2 moved = corner.x * reach.x * along + corner.y * reach.y * vec2(-along.y, along.x);
      gl_Position = vec4(2.0 * (focal / depth * seen.xy + moved) / pixels, 0.0, 1.0);
      away = corner * sqrt(2.0 * log(255.0 * opacity));
      float bits = third.z;
      painted = vec4(floor(bits / 65536.0), mod(floor(bits / 256.0), 256.0), mod(bits, 256.0), 255.0 * opacity) / 255.0;
    }`,
    `in vec2 away; in vec4 painted;
    out vec4 shown;
    void main() {
      float alpha = painted.a * exp(-0.5 * dot(away, away));
      shown = vec4(painted.rgb * alpha, alpha);
    }`,
  );
  const set = (name) => gl.getUniformLocation(shader, name);
  const { centres, texels, rows } = tabulated(object, arrays);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, 3 * ACROSS, rows, 0, gl.RGBA, gl.FLOAT, texels);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);

  const form = gl.createVertexArray();
  gl.bindVertexArray(form);
  const corner = gl.getAttribLocation(shader, "corner");
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
  gl.enableVertexAttribArray(corner);
  gl.vertexAttribPointer(corner, 2, gl.FLOAT, false, 0, 0);
  const index = gl.getAttribLocation(shader, "index");
  const order = gl.createBuffer();
  gl.bindBuffer(gl.ARRAY_BUFFER, order);
  gl.enableVertexAttribArray(index);
  gl.vertexAttribIPointer(index, 1, gl.UNSIGNED_INT, 0, 0);
  gl.vertexAttribDivisor(index, 1);
  const sort = sorter(centres);
  return (pose, width, height) => {
    const { right, above, backward, distance, focal } = pose;
    gl.useProgram(shader);
    gl.bindVertexArray(form);
    gl.disable(gl.DEPTH_TEST);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.bindBuffer(gl.ARRAY_BUFFER, order);
    gl.bufferData(gl.ARRAY_BUFFER, sort(backward), gl.DYNAMIC_DRAW);
    const columns = [0, 1, 2].map((i) => [right[i], above[i], backward[i]]).flat();
    gl.uniformMatrix3fv(set("turned"), false, columns);
    gl.uniform1f(set("distance_"), distance);
    gl.uniform1f(set("focal"), focal);
    // The blur of the film's pixels, in pixels of this canvas: scenes are trained to look right with it.
    gl.uniform1f(set("blur"), object.blur * (Math.min(width, height) / object.pixels) ** 2);
    gl.uniform2f(set("pixels"), width, height);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, centres.length / 3);
  };
}

/** For each Gaussian: centre and opacity, then its covariance, upper triangle by rows, then its colour in 24 bits. */
function tabulated(object, arrays) {
  const count = arrays.colours.length / 4;
  const rows = Math.ceil(count / ACROSS);
  const texels = new Float32Array(12 * ACROSS * rows);
  const centres = new Float32Array(3 * count);
  for (let i = 0; i < count; i++) {
    const scale = [0, 1, 2].map((k) => {
      const share = arrays.scales[4 * i + k] / 255;
      return Math.exp(object.scales[0] + share * (object.scales[1] - object.scales[0]));
    });
    const length = Math.hypot(...arrays.rotations.subarray(4 * i, 4 * i + 4));
    const [w, x, y, z] = Array.from(arrays.rotations.subarray(4 * i, 4 * i + 4), (q) => q / length);
    const axes = [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ].map((row) => row.map((entry, k) => entry * scale[k]));
    const spread = (a, b) => axes[a][0] * axes[b][0] + axes[a][1] * axes[b][1] + axes[a][2] * axes[b][2];
    const centre = [0, 1, 2].map((k) => object.low[k] + (object.size[k] * arrays.positions[4 * i + k]) / 65535);
    const [red, green, blue, alpha] = arrays.colours.subarray(4 * i, 4 * i + 4);
    centres.set(centre, 3 * i);
    texels.set([...centre, alpha / 255, spread(0, 0), spread(0, 1), spread(0, 2), spread(1, 1)], 12 * i);
    texels.set([spread(1, 2), spread(2, 2), red * 65536 + green * 256 + blue], 12 * i + 8);
  }
  return { centres, texels, rows };
}

/** Returns what gives the indices from the farthest to the nearest, for a direction to the camera: by counting. */
function sorter(centres) {
  const count = centres.length / 3;
  const depths = new Float32Array(count);
  const order = new Uint32Array(count);
  const begins = new Uint32Array(65537);
  return ([x, y, z]) => {
    let [low, high] = [Infinity, -Infinity];
    for (let i = 0; i < count; i++) {
      const depth = x * centres[3 * i] + y * centres[3 * i + 1] + z * centres[3 * i + 2];
      depths[i] = depth;
      low = Math.min(low, depth);
      high = Math.max(high, depth);
    }
    const steep = high > low ? 65535 / (high - low) : 0;
    begins.fill(0);
    for (let i = 0; i < count; i++) begins[((depths[i] - low) * steep | 0) + 1]++;
    for (let bin = 0; bin < 65536; bin++) begins[bin + 1] += begins[bin];
    for (let i = 0; i < count; i++) order[begins[(depths[i] - low) * steep | 0]++] = i;
    return order;
  };
}
