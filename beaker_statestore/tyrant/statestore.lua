-- What an original ttserver needs to keep our promises:
--
--   ttserver -ext statestore.lua ... casket.tcb
--
-- ttserver has no command that replaces a record only if it is as expected, but calls Lua functions by its command
-- "ext", at the caller's wish one at a time for each key (option RDBXOLCKREC). Its other commands do not heed that
-- lock: a binary "out" slips in between the get and the put of a function here. So clients that share records with
-- ours must change them by these functions, under that lock, and by nothing else. Reading is free.
--
-- What functions scripts are given is said in the chapter "Lua Extension" of Tokyo Tyrant's specification
-- (doc/spex.html), what exactly they return in scrext.c:
--   _get(key): the value, or nil              _vsiz(key): its length, or -1 when there is no such record
--   _put(key, value), _putkeep(key, value), _out(key): whether that was done
--   _log(message, level): level 2 is an error
-- A function that returns nil is answered with the status 1, as is one that does not exist; names that begin with an
-- underscore cannot be called from outside. A script may include this one by dofile("/path/to/statestore.lua").

-- Later values of a key, which only B+ trees can have and only others than we put there, lie hidden behind the first
-- one and must not come to light: all of them go.
local function remove(key)
  while _vsiz(key) >= 0 do
    if not _out(key) and _vsiz(key) >= 0 then
      _log("statestore.lua: a record could not be removed", 2)
      return false
    end
  end
  return true
end

-- Table databases drop a value that is not made of columns, fixed-length ones cut it, and neither says so.
local function is_stored(key, value)
  if _vsiz(key) == #value then
    return true
  end
  _log("statestore.lua: a record was not stored as it was given; only B+ tree and hash databases do that", 2)
  return false
end

local function put(key, value)
  return _put(key, value) and is_stored(key, value)
end

-- "1": added; "0": there was a record already; nil: failed.
local function add(key, value)
  if _putkeep(key, value) then
    return is_stored(key, value) and "1" or nil
  end
  return _vsiz(key) >= 0 and "0" or nil
end

-- One byte of flags (1: an expected value follows, 2: a new one follows), the length of the expected value in four
-- bytes, big-endian, the expected value, the new value. Answers whether that is what came, then both values.
local function unpack_swap(packed)
  if #packed < 5 then
    return false
  end
  local flags, a, b, c, d = string.byte(packed, 1, 5)
  local length = ((a * 256 + b) * 256 + c) * 256 + d
  local has_expected, has_new = flags % 2 == 1, flags >= 2
  if flags > 3 or #packed < 5 + length
    or not has_expected and length > 0
    or not has_new and #packed > 5 + length then
    return false
  end
  return true,
    has_expected and string.sub(packed, 6, 5 + length) or nil,
    has_new and string.sub(packed, 6 + length) or nil
end

-- The probe: the names of the functions here, separated by blanks. Has no effect.
function statestore()
  return "statestore cas statestore_put statestore_add statestore_delete"
end

-- "1": the record was as expected, and is as it is to be; "0": it was otherwise, and is left alone.
function cas(key, packed)
  local well_formed, expected, new = unpack_swap(packed)
  if not well_formed then
    return nil
  end
  if _get(key) ~= expected then
    return "0"
  end
  if new == nil then
    return remove(key) and "1" or nil
  end
  if expected == nil then
    return add(key, new)
  end
  return put(key, new) and "1" or nil
end

-- "1": stored, whatever was there.
function statestore_put(key, value)
  return put(key, value) and "1" or nil
end

-- "1": stored, since there was no record; "0": there was one, which is left alone.
function statestore_add(key, value)
  return add(key, value)
end

-- "1": removed; "0": there was none.
function statestore_delete(key)
  if _vsiz(key) < 0 then
    return "0"
  end
  return remove(key) and "1" or nil
end
