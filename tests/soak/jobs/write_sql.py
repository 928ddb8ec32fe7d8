"""write_sql.py SEED: prints statements for sqlite3: tables, indexes, transactions, a trigger, joins, aggregates, recursive queries, text functions, checks."""
import random
import sys

rng = random.Random(int(sys.argv[1]))
words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi psi omega".split()
print("create table t(id integer primary key, a integer, b text, c real); create index ta on t(a); create index tb on t(b, c);")
print("create table log(n integer); create trigger tt after delete on t begin insert into log values (old.id); end;")
for batch in range(8):
    print("begin;")
    for i in range(900):
        print(f"insert into t values ({batch * 1000 + i}, {rng.randrange(5000)}, '{rng.choice(words)}-{rng.choice(words)}-{rng.randrange(100)}', {rng.random():.9f});")
    print("commit;" if batch != 5 else "rollback;")
    print(f"update t set a = a + 1, c = c * 2 where a % 7 = {batch % 7}; delete from t where id % 13 = {batch};")
    print("select count(*), sum(a), round(avg(c), 9), min(b), max(b) from t; select count(*), sum(n) from log;")
print("select substr(b, 1, instr(b, '-') - 1) w, count(*), sum(a), printf('%.6f', total(c)) from t group by w order by 2 desc, 1;")
print("select count(*), sum(x.a * y.a % 1000) from t x join t y on x.a = y.a and x.id < y.id;")
print("with recursive p(n) as (select 2 union all select n + 1 from p where n < 700) select count(*), sum(n) from p where not exists (select 1 from p q where q.n < p.n and p.n % q.n = 0);")
print("select upper(b), length(b), hex(b), replace(b, 'a', 'A') from t where b like '%mu-%' order by b, id limit 40;")
print("select id, a, sum(a) over (order by id rows 5 preceding), rank() over (order by a, id) from t where id % 97 = 0 order by id;")
print("pragma integrity_check;")
