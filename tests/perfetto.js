// Perfetto's trace processor, as the Perfetto UI brings it (WebAssembly in a web worker), behind a Unix socket in its own RPC
// protocol, so that the `perfetto` package's TraceProcessor can ask it: the native program would have to be downloaded.
//
//   node perfetto.js FOLDER SOCKET        FOLDER: of a built Perfetto UI, with engine_bundle.js and trace_processor.wasm

const fs = require("fs");
const net = require("net");
const path = require("path");
const vm = require("vm");

const [folder, socketPath] = process.argv.slice(2);
const made = "const t=new e.WasmBridge;";
const source = fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8");
if (!source.includes(made)) throw new Error("this Perfetto UI is built in another way");

const worker = {
  WorkerGlobalScope: class {},
  location: { href: "http://localhost/engine_bundle.js" },
  XMLHttpRequest: class {
    open(how, name) {
      this.response = new Uint8Array(fs.readFileSync(path.join(folder, path.basename(name)))).buffer;
      this.status = 200;
    }
    send() {}
  },
  console, crypto, performance, setTimeout, clearTimeout, TextDecoder, TextEncoder, URL,
};
worker.self = worker;
vm.createContext(worker);
const { Uint8Array } = vm.runInContext("({ Uint8Array })", worker); // it takes its own kind only
vm.runInContext(source.replace(made, made + "r.bridge=t;"), worker);

let client = null;
const port = { onmessage: null, postMessage: (bytes) => client && client.write(bytes) };
worker.onmessage({ data: port });

function serve() {
  if (!worker.bridge.reqBufferAddr) return setTimeout(serve, 20);
  const server = net.createServer((socket) => {
    client = socket;
    socket.on("data", (bytes) => port.onmessage({ data: new Uint8Array(bytes) }));
    socket.on("error", () => {});
  });
  server.listen(socketPath, () => console.log("ready"));
}
serve();
process.stdin.on("end", () => process.exit(0)).resume(); // ends with whoever started it
