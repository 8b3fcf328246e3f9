// Drives the page at `/` in Chromium, and fails with a message at the first thing that is not as it should be.
// Arguments: the address of a server, a folder with red.png and blue.png, the folder of playwright-core, and one for pictures.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import assert from "node:assert/strict";

const [url, images, modules, pictures] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "x.js"))("playwright-core");
const LIMIT = 4;  // images of a request, which the server was started with
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
const [red, blue] = ["red.png", "blue.png"].map((name) => join(images, name));

async function open(options = {}) {
  const context = await browser.newContext({ viewport: { width: 900, height: 640 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(30_000);
  page.problems = [];
  page.on("pageerror", (error) => page.problems.push(String(error)));
  page.on("console", (message) => { if (message.type() === "error") page.problems.push(message.text()); });
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !/^(data|blob):/.test(request.url())) page.problems.push(request.url());
  });
  await page.goto(url);
  return page;
}
const answers = (page) => page.locator("#talk li.assistant:not(.waiting) span:nth-child(2)");
const done = (page, n) => page.waitForFunction(
  (n) => document.querySelectorAll("#talk li.assistant:not(.waiting)").length === n
    && !document.getElementById("send").hidden, n);

// An image by the file chooser, a question by the keyboard, and the answer as it streams.
let page = await open();
await page.waitForFunction(() => document.title === "small");
assert.equal(await page.evaluate(() => document.activeElement.id), "text", "the question has the focus");
const choosing = page.waitForEvent("filechooser");
await page.getByRole("button", { name: "Choose images" }).click();
await (await choosing).setFiles(red);
await page.getByAltText("Chosen image 1").waitFor();
await page.keyboard.type("what color?");
await page.keyboard.press("Enter");
await done(page, 1);
const first = await answers(page).first().textContent();
assert.equal(await page.getByAltText("Image 1 that you sent").count(), 1);
assert.match(await page.getByRole("status").textContent(), /Answer:/, "a screen reader is told");

// The conversation goes on, with its past.
await page.getByLabel("Your question").fill("a red circle?");
const [request] = await Promise.all([
  page.waitForRequest("**/v1/chat/completions"), page.getByRole("button", { name: "Send" }).click()]);
const sent = request.postDataJSON().messages;
assert.deepEqual(sent.map((m) => m.role), ["user", "assistant", "user"]);
assert.equal(sent[1].content, first);
await done(page, 2);

// A new conversation; an image by paste, taken away, then by drop.
await page.getByRole("button", { name: "New conversation" }).click();
assert.equal(await page.locator("#talk li").count(), 0);
const give = (kind, ...files) => page.evaluate(([kind, files]) => {
  const data = new DataTransfer();
  for (const [name, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  document.body.dispatchEvent(kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
    : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}, [kind, files.map((file) => [file, [...readFileSync(file)]])]);
await give("paste", red);
await page.getByRole("button", { name: "Remove image 1" }).click();
assert.equal(await page.locator("#chosen figure").count(), 0);
await give("drop", red);
await page.getByAltText("Chosen image 1").waitFor();
await page.getByLabel("Your question").fill("what color?");
await page.keyboard.press("Enter");
await done(page, 1);
assert.equal(await answers(page).first().textContent(), first, "the same image and question, the same answer");

// Several images of one question, chosen, dropped and pasted: in their order, some of them removed, with a limit.
await page.getByRole("button", { name: "New conversation" }).click();
await page.locator("#file").setInputFiles([red, blue]);
await page.getByAltText("Chosen image 2").waitFor();
await page.getByRole("button", { name: "Remove image 1" }).click();
await page.getByRole("button", { name: "Remove image 1" }).click();
await give("drop", red, blue);
await page.getByAltText("Chosen image 2").waitFor();
await give("paste", blue);
await page.getByAltText("Chosen image 3").waitFor();
await page.getByRole("button", { name: "Remove image 3" }).click();
await give("drop", ...Array(LIMIT).fill(red));
await page.getByText(`A conversation has at most ${LIMIT} images.`).waitFor();
assert.equal(await page.locator("#chosen figure").count(), LIMIT);
for (let i = LIMIT; i > 2; i--) await page.getByRole("button", { name: "Remove image " + i }).click();
await page.getByLabel("Your question").fill("the same color?");
const [asked] = await Promise.all([page.waitForRequest("**/v1/chat/completions"), page.keyboard.press("Enter")]);
const parts = asked.postDataJSON().messages[0].content;
const url_of = (file) => "data:image/png;base64," + readFileSync(file).toString("base64");
assert.deepEqual(parts.map((p) => p.image_url?.url ?? p.text), [url_of(red), url_of(blue), "the same color?"]);
await done(page, 1);
assert.equal(await page.locator("#talk li.user img").count(), 2);
assert.equal(await page.locator("#notice").textContent(), "", "what was wrong is forgotten with the question");
if (pictures) await page.screenshot({ path: join(pictures, "several.png") });

// A long answer is stopped by Escape, and what was written stays.
await page.route("**/v1/chat/completions", (route) => {
  const body = { ...route.request().postDataJSON(), ignore_eos: true, max_tokens: 2000 };
  route.continue({ postData: JSON.stringify(body) });
});
await page.getByLabel("Your question").fill("and now?");
await page.keyboard.press("Enter");
await page.waitForFunction(() => document.querySelector("#talk li.waiting span:nth-child(2)")?.textContent.length > 5);
assert.ok(await page.getByRole("button", { name: "Stop" }).isVisible());
await page.keyboard.press("Escape");
await done(page, 2);
assert.match(await page.locator("#talk li.assistant").last().textContent(), /stopped$/);
await page.unroute("**/v1/chat/completions");
assert.deepEqual(page.problems, [], "no error, nothing from outside");

// An error is shown, and the question is not lost.
await page.route("**/v1/chat/completions", (route) => route.fulfill({
  status: 429, contentType: "application/json", body: '{"error": {"message": "too many requests wait"}}' }));
await page.getByLabel("Your question").fill("again?");
await page.keyboard.press("Enter");
await page.locator("#talk li.error").waitFor();
assert.equal(await page.getByLabel("Your question").inputValue(), "again?");
assert.match(await page.locator("#talk li.error").textContent(), /too many requests wait/);
await page.context().close();

// Every control has a name and can be reached by Tab; nothing is wider than a phone; dark is dark.
page = await open({ viewport: { width: 360, height: 640 }, colorScheme: "dark", hasTouch: true, isMobile: true });
for (const control of await page.locator("button:visible, textarea, input:visible:not([aria-hidden])").all()) {
  const name = await control.evaluate((e) => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent);
  assert.ok(name.trim(), "a control without a name");
}
const reached = new Set();
for (let i = 0; i < 6; i++) { await page.keyboard.press("Tab"); reached.add(await page.evaluate(() => document.activeElement.id)); }
for (const id of ["new", "choose", "text", "send"]) assert.ok(reached.has(id), id + " is not reached by Tab");
assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "wider than the phone");
const luminance = await page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).reduce((a, b) => a + +b, 0));
assert.ok(luminance < 150, "dark is not dark");
await page.getByLabel("Your question").fill("what is this?");
await page.getByRole("button", { name: "Send" }).click();
await done(page, 1);
assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "an answer is wider than the phone");
assert.deepEqual(page.problems, []);
if (pictures) await page.screenshot({ path: join(pictures, "phone.png") });
await browser.close();
console.log("ok");
