/* Colours or normals of all runs. */
for (const choice of document.querySelectorAll("input[name=look]")) {
  const show = () => {
    if (choice.checked) document.body.dataset.look = choice.value;
  };
  choice.addEventListener("change", show);
  show(); // a browser may keep what was chosen before
}
