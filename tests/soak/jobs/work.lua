-- work.lua SEED [SCALE]: loops, floats, strings, tables, closures, coroutines, bit operations and FFI structures, for LuaJIT's compiler.
local bit, ffi = require("bit"), require("ffi")
local seed, scale = tonumber(arg[1]), tonumber(arg[2] or 8)

local function random()
    seed = (seed * 69069 + 1) % 4294967296
    return math.floor(seed / 65536)
end

local function nbody(steps)
    local x, y, vx, vy = {}, {}, {}, {}
    for i = 1, 5 do x[i], y[i], vx[i], vy[i] = random() / 65536, random() / 65536, 0, 0 end
    for _ = 1, steps do
        for i = 1, 5 do
            for j = 1, 5 do
                if i ~= j then
                    local dx, dy = x[j] - x[i], y[j] - y[i]
                    local d = dx * dx + dy * dy + 0.01
                    local f = 1e-4 / (d * math.sqrt(d))
                    vx[i], vy[i] = vx[i] + dx * f, vy[i] + dy * f
                end
            end
        end
        for i = 1, 5 do x[i], y[i] = x[i] + vx[i] * 0.01, y[i] + vy[i] * 0.01 end
    end
    return string.format("%.17g %.17g", x[1] + x[3], y[2] + y[5])
end

local function sieve(n)
    local composite, count = {}, 0
    for i = 2, n do
        if not composite[i] then
            count = count + 1
            for j = i * i, n, i do composite[j] = true end
        end
    end
    return count
end

local function strings(n)
    local parts, h = {}, 0
    for i = 1, n do parts[#parts + 1] = ("%x:%s"):format(random(), ("ab"):rep(random() % 5)) end
    local text = table.concat(parts, ",")
    for word in text:gmatch("%x+") do h = bit.bxor(bit.rol(h, 5), tonumber(word:sub(1, 6), 16)) end
    return bit.tohex(h) .. #text .. text:gsub("ab", "c"):sub(1, 20)
end

local function sorting(n)
    local t = {}
    for i = 1, n do t[i] = random() * 65536 + i end
    table.sort(t, function(a, b) return a % 9973 < b % 9973 or (a % 9973 == b % 9973 and a < b) end)
    local h = 0
    for i = 1, n do h = (h * 31 + t[i]) % 1000000007 end
    return h
end

local function coroutines(n)
    local sum = 0
    local producer = coroutine.wrap(function() for i = 1, n do coroutine.yield(i * 3) end end)
    for _ = 1, n do sum = sum + producer() end
    return sum
end

ffi.cdef "typedef struct { int32_t a; double b; uint8_t c[8]; uint64_t d; } item;"
local function structures(n)
    local items, h = ffi.new("item[?]", 256), 0ULL
    for i = 0, n - 1 do
        local it = items[i % 256]
        it.a, it.b, it.d = it.a + i, it.b + it.a / 3, it.d * 31 + i
        it.c[i % 8] = it.a % 256
        h = h + it.d + it.c[(i + 3) % 8]
    end
    return tostring(h) .. string.format(" %.17g", items[77].b)
end

for round = 1, 3 do
    print(nbody(60000 * scale / 8))
    print(sieve(400000 * scale / 8))
    print(strings(30000 * scale / 8))
    print(sorting(30000 * scale / 8))
    print(coroutines(200000 * scale / 8))
    print(structures(2000000 * scale / 8))
end
