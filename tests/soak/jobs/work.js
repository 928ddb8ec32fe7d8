// work.js SEED: what V8 compiles and recompiles: changing types, objects, closures, typed arrays, regular expressions, BigInt, WebAssembly, workers, the zlib and crypto libraries.
'use strict';
const { Worker, isMainThread, workerData, parentPort } = require('worker_threads');
const crypto = require('crypto'), zlib = require('zlib');
let seed = Number(isMainThread ? process.argv[2] : workerData) >>> 0;
const random = () => { seed = (Math.imul(seed, 69069) + 1) >>> 0; return seed >>> 16; };
const sha = (text) => crypto.createHash('sha256').update(text).digest('hex').slice(0, 16);

function objects(n) {
    const map = new Map(), plain = {};
    for (let i = 0; i < n; i++) {
        const o = { id: i, name: 'n' + random() % 1000, next: null, value: random() / 7 };
        if (i % 3 === 0) o['extra' + i % 17] = i;              // other hidden classes
        map.set(o.name, (map.get(o.name) || 0) + o.value);
        plain[o.name] = o;
        if (i % 1000 === 999) delete plain[o.name];
    }
    return sha(JSON.stringify([...map].sort()) + JSON.stringify(Object.keys(plain).sort()));
}

function poly(x) { return x + x; }
function deoptimize(n) {
    let h = 0;
    for (let i = 0; i < n; i++) {
        const v = poly(i % 5000 === 4999 ? 'x' + i : i % 700 === 699 ? i + 0.5 : i);
        h = (Math.imul(h, 31) + (typeof v === 'string' ? v.length : Math.floor(v))) | 0;
    }
    return h;
}

function typed(n) {
    const f = new Float64Array(4096), w = new Int32Array(f.buffer);
    for (let i = 0; i < n; i++) f[i & 4095] = Math.fround(f[(i * 7) & 4095] * 0.5 + Math.sqrt(i));
    let h = 0;
    for (let i = 0; i < w.length; i++) h = (Math.imul(h, 33) ^ w[i]) | 0;
    return h;
}

function text(n) {
    const parts = [];
    for (let i = 0; i < n; i++) parts.push(`key${random() % 50}=value-${random()};`);
    const found = {};
    for (const m of parts.join('').matchAll(/(key\d+)=value-(\d+?)(\d);/g)) found[m[1]] = (found[m[1]] || 0) + Number(m[2]) * Number(m[3]);
    return sha(JSON.stringify(Object.entries(found).sort()));
}

function big(n) {
    let a = 1n, b = BigInt(random());
    for (let i = 0; i < n; i++) { a = a * 3n + b; b = (b ^ a) & ((1n << 2048n) - 1n); if (i % 50 === 0) a %= (1n << 1024n) + 7n; }
    return sha(a.toString() + b.toString(16));
}

function* numbers(n) { for (let i = 0; i < n; i++) yield i * random(); }

function wasm() {
    // (func (export "f") (param i32) (result i32) (local i32) loop: local1 = local1 * 31 + param; br_if --param)
    const code = [0x20, 1, 0x41, 31, 0x6c, 0x20, 0, 0x6a, 0x21, 1, 0x20, 0, 0x41, 1, 0x6b, 0x22, 0, 0x0d, 0, 0x0b, 0x20, 1, 0x0b];
    const body = [1, 1, 0x7f, 0x03, 0x40, ...code];
    const bytes = [0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 6, 1, 0x60, 1, 0x7f, 1, 0x7f, 3, 2, 1, 0, 7, 5, 1, 1, 0x66, 0, 0, 10, body.length + 2, 1, body.length, ...body];
    const f = new WebAssembly.Instance(new WebAssembly.Module(new Uint8Array(bytes))).exports.f;
    let sum = 0;
    for (let i = 1; i < 400; i++) sum = (sum + f(i * 100)) | 0;
    return sum;
}

function all() {
    const out = [objects(40000), deoptimize(1500000), typed(1500000), text(25000), big(1500), wasm()];
    let sum = 0;
    for (const v of numbers(100000)) sum += v;
    out.push(sum);
    const data = Buffer.from(Array.from({ length: 200000 }, () => random() & 63));
    const packed = zlib.deflateSync(data, { level: 6 });
    out.push(sha(packed), zlib.inflateSync(packed).equals(data));
    out.push(crypto.pbkdf2Sync('password', 'salt' + seed, 3000, 32, 'sha512').toString('hex'));
    return out;
}

if (isMainThread) {
    const workers = [1, 2].map((n) => new Promise((resolve, reject) => {
        const worker = new Worker(__filename, { workerData: seed + n });
        worker.on('message', resolve);
        worker.on('error', reject);
    }));
    console.log(JSON.stringify(all()));
    Promise.all(workers).then((results) => results.forEach((r) => console.log(JSON.stringify(r))));
} else {
    parentPort.postMessage(all());
}
