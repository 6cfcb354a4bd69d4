// Bundle src/ and page.html into ../static/graph.html; --check compares instead.
import { readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const at = (path) => new URL(path, import.meta.url);
const bundle = async (entry, options) => {
  const result = await build({ entryPoints: [at(entry).pathname], bundle: true, minify: true, write: false, charset: "ascii", ...options });
  return result.outputFiles[0].text.trim();
};
const notice = (name) => `/*! ${name}\n${readFileSync(at(`node_modules/${name}/LICENSE`), "utf8").trim()}\n*/`;
const code = await bundle("src/main.ts", { format: "iife", target: "es2022", legalComments: "none" });
const script = ["@dagrejs/dagre", "@dagrejs/graphlib"].map(notice).join("\n") + "\n" + code;
const style = await bundle("src/page.css", { legalComments: "none" });
if (/<\/?script|<!--/i.test(script)) throw new Error("the bundle would end its script element");
// Functions, so that $ in the code stays what it is.
const page = readFileSync(at("src/page.html"), "utf8").replace("/*STYLE*/", () => style).replace("/*SCRIPT*/", () => script);
const out = at("../static/graph.html");
if (process.argv.includes("--check")) {
  if (readFileSync(out, "utf8") !== page) {
    console.error("static/graph.html is not what web/ builds: run npm run build and commit it");
    process.exit(1);
  }
  console.log("static/graph.html is what web/ builds");
} else {
  writeFileSync(out, page);
  console.log(`static/graph.html: ${(page.length / 1024).toFixed(0)} KiB`);
}
