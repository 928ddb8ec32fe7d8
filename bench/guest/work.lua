-- Tables, closures, strings, floating point; the same for Lua and LuaJIT.
local n = tonumber(arg[1])
local function counter()
  local total = 0
  return function(by) total = (total + by) % 1000003; return total end
end
local add, seen = counter(), {}
for i = 1, n do
  local key = i * 7919 % 1013
  seen[key] = (seen[key] or 0) + i % 7
  add(seen[key])
end
local parts = {}
for i = 1, n / 20 do parts[#parts + 1] = string.format("%d", i * 31 % 257) end
local text = table.concat(parts, ",")
local commas = 0
for _ in string.gmatch(text, "1%d,") do commas = commas + 1 end
local x = 0.5
for i = 1, n do x = 3.57 * x * (1 - x) end
print(add(0), #text, commas, string.format("%.17g", x))
