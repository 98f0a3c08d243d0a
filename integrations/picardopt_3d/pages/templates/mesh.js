/* Triangles with colours at the vertices or a texture. */

async function meshPainter(gl, object, arrays) {
  const shader = program(
    gl,
    `uniform mat4 worldToClip; uniform vec3 low, size;
    in vec3 position; in vec3 normal; in vec3 colour; in vec2 place;
    out vec3 bent; out vec3 painted; out vec2 at;
    void main() {
      gl_Position = worldToClip * vec4(low + size * position, 1.0);
      bent = normal; painted = colour; at = place;
    }`,
    `uniform sampler2D picture; uniform bool textured; uniform int look; uniform vec3 light;
    in vec3 bent; in vec3 painted; in vec2 at;
    out vec4 shown;
    void main() {
      vec3 albedo = textured ? texture(picture, at).rgb : painted;
      vec3 normal = normalize(bent) * (gl_FrontFacing ? 1.0 : -1.0);
      float half_ = 0.5 + 0.5 * dot(normal, light);
      vec3 lit = albedo * (0.5 + 0.58 * half_ * half_) + 0.06 * pow(half_, 12.0);
      shown = vec4(look == 0 ? lit : look == 1 ? albedo : 0.5 + 0.5 * normal, 1.0);
    }`,
  );
  const set = (name) => gl.getUniformLocation(shader, name);
  const textured = Boolean(object.texture);
  const form = gl.createVertexArray();
  gl.bindVertexArray(form);
  const attribute = (name, array, size, type, stride) => {
    const place = gl.getAttribLocation(shader, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, type, true, stride, 0);
  };
  attribute("position", arrays.positions, 3, gl.UNSIGNED_SHORT, 8);
  attribute("normal", arrays.normals, 3, gl.BYTE, 4);
  if (textured) attribute("place", arrays.coordinates, 2, gl.UNSIGNED_SHORT, 4);
  else attribute("colour", arrays.colours, 3, gl.UNSIGNED_BYTE, 4);
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, arrays.faces, gl.STATIC_DRAW);
  if (textured) await loadTexture(gl, object.texture);
  return (pose, width, height, mode) => {
    const { right, above, backward } = pose;
    const towards = [0, 1, 2].map((i) => backward[i] + 0.7 * above[i] - 0.5 * right[i]);
    const length = Math.hypot(...towards);
    gl.useProgram(shader);
    gl.bindVertexArray(form);
    gl.enable(gl.DEPTH_TEST);
    gl.uniformMatrix4fv(set("worldToClip"), false, worldToClip(pose, width, height));
    gl.uniform3fv(set("low"), object.low);
    gl.uniform3fv(set("size"), object.size);
    gl.uniform3fv(set("light"), towards.map((x) => x / length));
    gl.uniform1i(set("textured"), textured);
    gl.uniform1i(set("look"), { lit: 0, colour: 1, normals: 2 }[mode]);
    gl.drawElements(gl.TRIANGLES, arrays.faces.length, gl.UNSIGNED_INT, 0);
  };
}

/** Binds a picture as the texture: row 0 on top, as its coordinates count. */
async function loadTexture(gl, source) {
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, picture);
  gl.generateMipmap(gl.TEXTURE_2D);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_LINEAR);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE);
}
