//! What the commands print about the mesh of [`super::daemon`], to the byte.

pub(crate) const STATUS: &str = "\
state         member
mesh          aaaaaaaaaaaaaaaa
trust domain  maaaaaaaaaaaaaaaa.meshd.internal
host          pi-1 (authority)
node          aaaaaaaaaaaaaaaaaaaaaaaaaa
members       3, 2 reachable
mode          permissive
capture       on
clock         floor: the system clock is behind
meshd         0.1.0, up 1h1m
";

pub(crate) const STATUS_JSON: &str = r#"{
  "state": "member",
  "reason": null,
  "code": null,
  "fleet_token": null,
  "mesh": "aaaaaaaaaaaaaaaa",
  "trust_domain": "maaaaaaaaaaaaaaaa.meshd.internal",
  "node": "aaaaaaaaaaaaaaaaaaaaaaaaaa",
  "host_name": "pi-1",
  "version": "0.1.0",
  "mode": "permissive",
  "capture": {
    "on": true,
    "why": null
  },
  "clock": {
    "source": "floor",
    "now": 1800000000,
    "why": "the system clock is behind"
  },
  "authority": true,
  "members": {
    "active": 3,
    "reachable": 2
  },
  "uptime_seconds": 3700,
  "pid": 4242,
  "older": []
}
"#;

pub(crate) const NODES: &str = "\
NAME   STATE  ROLE       MODE        ZONE  LISTENERS   SEEN  VERSION  ADDRESSES
pi-1   self   authority  permissive  shed          0     0s  0.1.0    192.0.2.1
pi-2   up     member     permissive  -             1  1m40s  0.1.0    192.0.2.2 2001:db8::2-
attic  down   member     -           -             2      -  -        192.0.2.3!
";

pub(crate) const SERVICES: &str = "\
HOST  PORT  WORKLOAD                                      ADDRESSES
pi-2    80  /host/pi-2/unit/nginx.service                 192.0.2.2 2001:db8::2
pi-2  5432  /host/pi-2/unit/postgresql_4016-main.service  192.0.2.2
";

pub(crate) const EDGES: &str = "\
DIR  CLIENT                SERVER                         PEER  ADDRESS              OPEN  TOTAL  FAILED       IN    OUT   SEEN  SECURED
out  /host/pi-1/user/anna  /host/pi-2/unit/nginx.service  pi-2  192.0.2.2:80            1     12       0  1.5 MiB  900 B     3s  yes
in   -                     /host/pi-1                     -     [2001:db8::99]:8080     0      1       1      0 B    0 B  1m30s  no: not a member
";

pub(crate) const STAT: &str = "\
DIR  SERVICE                        PORT  PEER  OPEN  CONN/S  SUCCESS  IN/S  OUT/S  P50  P95  P99
out  /host/pi-2/unit/nginx.service    80  pi-2     1       0  100.00%   0 B    0 B  5ms   1m    -
in   /host/pi-1                     8080  -        0       0    0.00%   0 B    0 B    -    -    -
";

pub(crate) const IDENTITY: &str = "\
SPIFFE ID                                                      EXPIRES IN  RENEWED IN  ISSUED BY  SERIAL
spiffe://maaaaaaaaaaaaaaaa.meshd.internal/host/pi-1                    3d          1d  pi-1       0badcafe
spiffe://maaaaaaaaaaaaaaaa.meshd.internal/host/pi-1/user/anna     expired     overdue  -          -
";

pub(crate) const CHECK: &str = "\
configuration
-------------
√ the configuration is valid
√ no setting in the environment is misspelt

daemon
------
√ meshd answers (version 0.1.0)

mesh
----
√ this host is a member
‼ an authority is in reach
    start it

peers
-----
× attic answers
    no answer in time
    is meshd running there?
    https://github.com/meshd/meshd/blob/main/docs/checks.md#check-peer

1 failed, 1 to look at
";

pub(crate) const CHECK_SHORT: &str = "\
‼ an authority is in reach
× attic answers: no answer in time https://github.com/meshd/meshd/blob/main/docs/checks.md#check-peer
1 failed, 1 to look at
";
