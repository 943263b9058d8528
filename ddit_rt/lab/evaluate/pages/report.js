"use strict";
document.documentElement.classList.remove("no-script");
for (const article of document.querySelectorAll(".case")) {
  const frame = article.querySelector(".frame");
  const [right, left] = frame.querySelectorAll("img");
  const name = frame.querySelector(".tag.b");
  const range = frame.querySelector("input");
  const buttons = [...article.querySelectorAll(".strip button")];
  left.src = article.querySelector(".strip img").src;
  const cut = () => frame.style.setProperty("--cut", range.value + "%");
  const choose = (button) => {
    right.src = button.querySelector("img").src;
    right.alt = name.textContent = button.dataset.title;
    range.setAttribute("aria-label", "full resolution left of the edge, " + button.dataset.title + " right of it");
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
  };
  range.addEventListener("input", cut);
  for (const button of buttons) button.addEventListener("click", () => choose(button));
  cut();
  choose(buttons.find((button) => "main" in button.dataset));
}
