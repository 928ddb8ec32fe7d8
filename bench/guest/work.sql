-- Inserts, an index, joins, grouping and updates.
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price INTEGER, kind INTEGER);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
INSERT INTO item SELECT i, printf('item %05d of %d', i * 7919 % 20011, i % 13), i * 31 % 997, i % 17 FROM n;
COMMIT;
CREATE INDEX by_kind ON item (kind, price);
SELECT kind, count(*), sum(price), max(name) FROM item GROUP BY kind ORDER BY kind;
UPDATE item SET price = price + 1 WHERE id % 3 = 0;
SELECT count(*), sum(a.price - b.price) FROM item a JOIN item b ON b.id = a.id * 3 WHERE a.name LIKE '%1%';
SELECT name FROM item WHERE name LIKE '%77%' ORDER BY name DESC LIMIT 5;
DELETE FROM item WHERE kind = 3;
SELECT count(*), sum(length(name)), avg(price) FROM item;
