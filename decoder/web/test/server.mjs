/**
 * A server of files for the tests and for `make web`: `folders` maps the beginnings of addresses to folders. With
 * `policy`, it sends that content security policy. A file whose address ends with ?slow comes in two parts.
 */
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".json": "application/json",
  ".wasm": "application/wasm",
  ".svg": "image/svg+xml",
  ".png": "image/png",
  ".jpg": "image/jpeg",
  ".avif": "image/avif",
};

export async function serve(folders, { port = 0, policy, pages = {} } = {}) {
  const requests = [];
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    requests.push(pathname);
    if (pathname === "/favicon.ico") return response.writeHead(204).end();
    const headers = { "cache-control": "max-age=600", "access-control-allow-origin": "*" };
    if (policy) headers["content-security-policy"] = policy;
    try {
      const page = pages[pathname];
      const body = page ?? (await readFile(locate(folders, decodeURIComponent(pathname))));
      headers["content-type"] = page ? TYPES[".html"] : (TYPES[extname(pathname)] ?? "application/octet-stream");
      response.writeHead(200, headers);
      if (request.url.endsWith("?slow")) {
        response.write(body.subarray(0, 100));
        await new Promise((resolve) => setTimeout(resolve, 400));
        response.end(body.subarray(100));
      } else {
        response.end(body);
      }
    } catch {
      response.writeHead(404, { "content-type": "text/plain" }).end(`${pathname} is not here\n`);
    }
  });
  await new Promise((resolve, reject) => server.once("error", reject).listen(port, "127.0.0.1", resolve));
  return { address: `http://localhost:${server.address().port}`, requests, close: () => server.close() };
}

function locate(folders, pathname) {
  for (const [start, folder] of Object.entries(folders)) {
    const rest = normalize(pathname).slice(start.length);
    if (normalize(pathname).startsWith(start)) return join(folder instanceof URL ? fileURLToPath(folder) : folder, rest);
  }
  throw new Error("no such folder");
}
