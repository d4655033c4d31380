"""Policies in the form of 1.5's published examples: one for each, written anew, with flows and their verdicts.

Source: inventory EX-P01 to EX-P36. What is typical of them is kept: quotes, `description` beside `spec`, labels by
source, entities, rules of one object in `specs`.
"""

from __future__ import annotations

from typing import NamedTuple

HTTP_GET = {"method": "GET", "path": "/public"}
HTTP_PUT = {"method": "PUT", "path": "/v1/exhaust-port"}
HTTP_POST = {"method": "POST", "path": "/v1/request-landing"}


class Published(NamedTuple):
    """``flows``: from, to, port, protocol, request and whether it is allowed."""

    name: str
    text: str
    flows: list[tuple[str, str, int | None, str, dict[str, object], bool]]


PODS = """
kind: Namespace
apiVersion: v1
metadata: {name: ns1, labels: {team: one}}
---
kind: Namespace
apiVersion: v1
metadata: {name: ns2}
"""
POD = """
---
kind: Pod
apiVersion: v1
metadata:
  name: %s
  namespace: %s
  labels: {%s}
spec:
  serviceAccountName: %s
  containers: [{name: main, image: example}]
"""
for _name, _space, _labels, _account in (
    ("deathstar", "default", "org: empire, class: deathstar", "default"),
    ("tiefighter", "default", "org: empire, class: tiefighter", "default"),
    ("xwing", "default", "org: alliance, class: xwing", "default"),
    ("kafka", "default", "app: kafka", "default"),
    ("hq", "default", "app: empire-hq", "default"),
    ("outpost", "default", "app: empire-outpost", "default"),
    ("front", "default", "role: frontend", "default"),
    ("back", "default", "role: backend", "default"),
    ("service", "default", "app: myService, env: prod", "default"),
    ("prod", "default", "env: prod", "default"),
    ("dev", "default", "env: dev", "default"),
    ("dns", "kube-system", "k8s-app: kube-dns", "default"),
    ("leia", "ns1", "name: leia", "leia"),
    ("luke", "ns1", "name: luke", "luke"),
    ("luke", "ns2", "name: luke", "luke"),
    ("vader", "ns2", "name: vader", "vader"),
):
    PODS += POD % (_name, _space, _labels, _account)

STARWARS = """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
description: "Only ships of the Empire may ask for a landing"
metadata:
  name: "rule1"
spec:
  endpointSelector:
    matchLabels:
      org: empire
      class: deathstar
  ingress:
  - fromEndpoints:
    - matchLabels:
        org: empire
    toPorts:
    - ports:
      - port: "80"
        protocol: TCP
"""
PUBLISHED = [
    Published(
        "l3-l4-policy",
        STARWARS,
        [
            ("default/tiefighter", "default/deathstar", 80, "TCP", {}, True),
            ("default/tiefighter", "default/deathstar", 443, "TCP", {}, False),
            ("default/xwing", "default/deathstar", 80, "TCP", {}, False),
            ("default/deathstar", "default/xwing", 80, "TCP", {}, True),
        ],
    ),
    Published(
        "l7-policy",
        STARWARS
        + """
      rules:
        http:
        - method: "POST"
          path: "/v1/request-landing"
""",
        [
            ("default/tiefighter", "default/deathstar", 80, "TCP", {"http": HTTP_POST}, True),
            ("default/tiefighter", "default/deathstar", 80, "TCP", {"http": HTTP_PUT}, False),
            ("default/xwing", "default/deathstar", 80, "TCP", {"http": HTTP_POST}, False),
        ],
    ),
    Published(
        "kafka-role",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
description: "Outposts may only read the announcements"
metadata:
  name: "outposts"
spec:
  endpointSelector:
    matchLabels:
      app: kafka
  ingress:
  - fromEndpoints:
    - matchLabels:
        app: empire-outpost
    toPorts:
    - ports:
      - port: "9092"
        protocol: TCP
      rules:
        kafka:
        - role: "consume"
          topic: "empire-announce"
""",
        [
            (
                "default/outpost",
                "default/kafka",
                9092,
                "TCP",
                {"kafka": {"role": "consume", "topic": "empire-announce"}},
                True,
            ),
            (
                "default/outpost",
                "default/kafka",
                9092,
                "TCP",
                {"kafka": {"role": "consume", "topic": "deathstar-plans"}},
                False,
            ),
            (
                "default/outpost",
                "default/kafka",
                9092,
                "TCP",
                {"kafka": {"role": "produce", "topic": "empire-announce"}},
                False,
            ),
            ("default/hq", "default/kafka", 9092, "TCP", {}, False),
        ],
    ),
    Published(
        "cluster-label",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "allow-cross-cluster"
description: "Allow the front of one cluster to reach the back of another"
spec:
  endpointSelector:
    matchLabels:
      role: backend
      io.cilium.k8s.policy.cluster: default
  ingress:
  - fromEndpoints:
    - matchLabels:
        role: frontend
        io.cilium.k8s.policy.cluster: elsewhere
""",
        [("default/front", "default/back", 80, "TCP", {}, False)],
    ),
    Published(
        "isolate-namespaces",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "isolate-ns1"
  namespace: ns1
spec:
  endpointSelector:
    matchLabels:
      {}
  ingress:
  - fromEndpoints:
    - matchLabels:
        {}
---
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "isolate-ns1"
  namespace: ns2
spec:
  endpointSelector:
    matchLabels:
      {}
  ingress:
  - fromEndpoints:
    - matchLabels:
        {}
""",
        [
            ("ns1/luke", "ns1/leia", 80, "TCP", {}, True),
            ("ns2/luke", "ns1/leia", 80, "TCP", {}, False),
            ("ns1/luke", "ns2/vader", 80, "TCP", {}, False),
            ("entity/world", "ns1/leia", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "kubedns-policy",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "allow-to-kubedns"
  namespace: ns1
spec:
  endpointSelector:
    {}
  egress:
  - toEndpoints:
    - matchLabels:
        k8s:io.kubernetes.pod.namespace: kube-system
        k8s-app: kube-dns
    toPorts:
    - ports:
      - port: '53'
        protocol: UDP
""",
        [
            ("ns1/leia", "kube-system/dns", 53, "UDP", {}, True),
            ("ns1/leia", "kube-system/dns", 53, "TCP", {}, False),
            ("ns1/leia", "ns1/luke", 53, "UDP", {}, False),
            ("ns2/luke", "ns2/vader", 80, "TCP", {}, True),
        ],
    ),
    Published(
        "namespace-policy",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "k8s-expose-across-namespace"
  namespace: ns1
spec:
  endpointSelector:
    matchLabels:
      name: leia
  ingress:
  - fromEndpoints:
    - matchLabels:
        k8s:io.kubernetes.pod.namespace: ns2
        name: luke
""",
        [
            ("ns2/luke", "ns1/leia", 80, "TCP", {}, True),
            ("ns1/luke", "ns1/leia", 80, "TCP", {}, False),
            ("ns2/vader", "ns1/leia", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "serviceaccount-policy",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "k8s-svc-account"
  namespace: ns1
spec:
  endpointSelector:
    matchLabels:
      io.cilium.k8s.policy.serviceaccount: leia
  ingress:
  - fromEndpoints:
    - matchLabels:
        io.cilium.k8s.policy.serviceaccount: luke
    toPorts:
    - ports:
      - port: '80'
        protocol: TCP
      rules:
        http:
        - method: GET
          path: "/public$"
""",
        [
            ("ns1/luke", "ns1/leia", 80, "TCP", {"http": HTTP_GET}, True),
            ("ns1/luke", "ns1/leia", 80, "TCP", {"http": HTTP_PUT}, False),
            ("ns2/luke", "ns1/leia", 80, "TCP", {"http": HTTP_GET}, False),
        ],
    ),
    Published(
        "cidr",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "cidr-rule"
spec:
  endpointSelector:
    matchLabels:
      app: myService
  egress:
  - toCIDR:
    - 20.1.1.1/32
  - toCIDRSet:
    - cidr: 10.0.0.0/8
      except:
      - 10.96.0.0/12
""",
        [
            ("default/service", "ip/20.1.1.1", 80, "TCP", {}, True),
            ("default/service", "ip/10.1.1.1", 80, "TCP", {}, True),
            ("default/service", "ip/10.97.1.1", 80, "TCP", {}, False),
            ("default/service", "ip/8.8.8.8", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "egress-default-deny",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "deny-all-egress"
spec:
  endpointSelector:
    matchLabels:
      role: frontend
  egress:
  - {}
""",
        [
            ("default/front", "default/back", 80, "TCP", {}, False),
            ("default/back", "default/front", 80, "TCP", {}, True),
        ],
    ),
    Published(
        "egress-allow-all",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "allow-all-from-frontend"
spec:
  endpointSelector:
    matchLabels:
      role: frontend
  egress:
  - toEntities:
    - all
""",
        [
            ("default/front", "default/back", 80, "TCP", {}, True),
            ("default/front", "entity/world", 80, "TCP", {}, True),
        ],
    ),
    Published(
        "ingress-allow-all",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "allow-all-to-victim"
spec:
  endpointSelector:
    matchLabels:
      role: backend
  ingress:
  - fromEndpoints:
    - {}
""",
        [("default/front", "default/back", 80, "TCP", {}, True), ("ns1/leia", "default/back", 80, "TCP", {}, False)],
    ),
    Published(
        "entity-host",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "dev-to-host"
spec:
  endpointSelector:
    matchLabels:
      env: dev
  egress:
    - toEntities:
      - host
""",
        [
            ("default/dev", "entity/host", 80, "TCP", {}, True),
            ("default/dev", "entity/world", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "entity-world",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "from-world-to-role-public"
spec:
  endpointSelector:
    matchLabels:
      role: frontend
  ingress:
    - fromEntities:
      - world
""",
        [
            ("ip/198.51.100.1", "default/front", 80, "TCP", {}, True),
            ("default/back", "default/front", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "fqdn",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "to-fqdn"
spec:
  endpointSelector:
    matchLabels:
      app: myService
  egress:
    - toFQDNs:
        - matchName: "my-remote-service.com"
    - toEndpoints:
        - matchLabels:
            "k8s:io.kubernetes.pod.namespace": kube-system
            "k8s:k8s-app": kube-dns
      toPorts:
        - ports:
           - port: "53"
             protocol: ANY
          rules:
            dns:
              - matchPattern: "*"
""",
        [
            ("default/service", "fqdn/my-remote-service.com", 443, "TCP", {}, True),
            ("default/service", "fqdn/another.com", 443, "TCP", {}, False),
            ("default/service", "kube-system/dns", 53, "UDP", {"dns": {"name": "any.example"}}, True),
            ("default/service", "kube-system/dns", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "dns-visibility",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "tofqdn-dns-visibility"
spec:
  endpointSelector:
    matchLabels:
      any:env: prod
  egress:
  - toEndpoints:
    - matchLabels:
       "k8s:io.kubernetes.pod.namespace": kube-system
       "k8s:k8s-app": kube-dns
    toPorts:
      - ports:
         - port: "53"
           protocol: ANY
        rules:
          dns:
            - matchPattern: "*"
  - toFQDNs:
      - matchName: "example.io"
      - matchName: "sub.example.io"
      - matchPattern: "*.sub.example.io"
""",
        [
            ("default/prod", "fqdn/sub.example.io", 443, "TCP", {}, True),
            ("default/prod", "fqdn/a.sub.example.io", 443, "TCP", {}, True),
            ("default/prod", "fqdn/a.b.sub.example.io", 443, "TCP", {}, False),
        ],
    ),
    Published(
        "requires",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "requires-rule"
specs:
  - description: "For endpoints with env=prod, only allow if the source also has env=prod"
    endpointSelector:
      matchLabels:
        env: prod
    ingress:
    - fromRequires:
      - matchLabels:
          env: prod
  - endpointSelector:
      matchLabels:
        env: prod
    ingress:
    - fromEndpoints:
      - {}
""",
        [
            ("default/prod", "default/service", 80, "TCP", {}, True),
            ("default/dev", "default/service", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "service-labels",
        """
kind: Service
apiVersion: v1
metadata: {name: outside, namespace: default, labels: {head: none}}
spec: {ports: [{port: 80}]}
---
kind: Endpoints
apiVersion: v1
metadata: {name: outside, namespace: default}
subsets: [{addresses: [{ip: 203.0.113.7}], ports: [{port: 80}]}]
---
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "service-labels-rule"
spec:
  endpointSelector:
    matchLabels:
      app: myService
  egress:
  - toServices:
    - k8sServiceSelector:
        selector:
          matchLabels:
            head: none
---
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "service-rule"
spec:
  endpointSelector:
    matchLabels:
      role: frontend
  egress:
  - toServices:
    - k8sService:
        serviceName: outside
        namespace: default
""",
        [
            ("default/service", "ip/203.0.113.7", 80, "TCP", {}, True),
            ("default/front", "ip/203.0.113.7", 80, "TCP", {}, True),
            ("default/front", "ip/203.0.113.8", 80, "TCP", {}, False),
        ],
    ),
    Published(
        "l4",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "l4-rule"
spec:
  endpointSelector:
    matchLabels:
      app: myService
  egress:
    - toPorts:
      - ports:
        - port: "80"
          protocol: TCP
""",
        [
            ("default/service", "entity/world", 80, "TCP", {}, True),
            ("default/service", "default/back", 81, "TCP", {}, False),
        ],
    ),
    Published(
        "cidr-l4-combined",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "cidr-l4-rule"
spec:
  endpointSelector:
    matchLabels:
      role: frontend
  egress:
  - toCIDR:
    - 192.0.2.0/24
    toPorts:
    - ports:
      - port: "80"
        protocol: TCP
""",
        [
            ("default/front", "ip/192.0.2.9", 80, "TCP", {}, True),
            ("default/front", "ip/192.0.2.9", 81, "TCP", {}, False),
        ],
    ),
    Published(
        "init",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: init
specs:
  - endpointSelector:
      matchLabels:
        "reserved:init": ""
    ingress:
    - fromEntities:
      - host
    egress:
    - toEntities:
      - all
      toPorts:
      - ports:
        - port: "53"
          protocol: UDP
""",
        [
            ("entity/host", "entity/init", 80, "TCP", {}, True),
            ("default/front", "entity/init", 80, "TCP", {}, False),
            ("entity/init", "kube-system/dns", 53, "UDP", {}, True),
            ("entity/init", "kube-system/dns", 53, "TCP", {}, False),
        ],
    ),
    Published(
        "from-init",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
metadata:
  name: "from-init"
spec:
  endpointSelector:
    matchLabels:
      app: myService
  ingress:
    - fromEntities:
      - init
    - toPorts:
      - ports:
        - port: "53"
          protocol: UDP
""",
        [
            ("default/front", "default/service", 53, "UDP", {}, True),
            ("default/front", "default/service", 53, "TCP", {}, False),
        ],
    ),
    Published(
        "l7-multi",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
description: "Get from prod, post to one service outside"
metadata:
  name: "l7-multi"
specs:
  - endpointSelector:
      matchLabels:
        app: myService
    ingress:
    - fromEndpoints:
      - matchLabels:
          env: prod
      toPorts:
      - ports:
        - port: "80"
          protocol: TCP
        rules:
          http:
          - method: "GET"
            path: "/public"
    egress:
    - toPorts:
      - ports:
        - port: "80"
          protocol: "TCP"
        rules:
          http:
          - method: POST
            host: "^external-service.org$"
            headers:
            - 'X-My-Header: true'
            - X-Other
""",
        [
            ("default/prod", "default/service", 80, "TCP", {"http": HTTP_GET}, True),
            ("default/dev", "default/service", 80, "TCP", {"http": HTTP_GET}, False),
            (
                "default/service",
                "entity/world",
                80,
                "TCP",
                {
                    "http": {
                        "method": "POST",
                        "host": "external-service.org",
                        "headers": {"x-my-header": "true", "x-other": "1"},
                    }
                },
                True,
            ),
            (
                "default/service",
                "entity/world",
                80,
                "TCP",
                {"http": {"method": "POST", "host": "external-service.org"}},
                False,
            ),
        ],
    ),
    Published(
        "cassandra",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
description: "Outposts may read one table, everybody what drivers need"
metadata:
  name: "secure-empire-cassandra"
specs:
- endpointSelector:
    matchLabels:
      app: kafka
  ingress:
  - fromEndpoints:
    - matchLabels:
        app: empire-outpost
    toPorts:
    - ports:
      - port: "9042"
        protocol: TCP
      rules:
        l7proto: cassandra
        l7:
        - query_action: "select"
          query_table: "system\\\\..*"
        - query_action: "insert"
          query_table: "attendance.daily_records"
""",
        [
            ("default/outpost", "default/kafka", 9042, "TCP", {}, True),
            ("default/hq", "default/kafka", 9042, "TCP", {}, False),
        ],
    ),
    Published(
        "groups",
        """
apiVersion: "cilium.io/v2"
kind: CiliumNetworkPolicy
description: "To the instances of one security group"
metadata:
  name: "to-groups-sample"
spec:
  endpointSelector:
    matchLabels:
      org: alliance
      class: xwing
  egress:
  - toPorts:
    - ports:
      - port: "80"
        protocol: TCP
    toGroups:
    - aws:
        securityGroupsIds:
        - 'sg-0f2146100a88d03c3'
""",
        [("default/xwing", "entity/world", 80, "TCP", {}, False)],
    ),
]
BARE = """
[{
    "labels": [{"key": "name", "value": "l3-rule"}],
    "endpointSelector": {"matchLabels": {"role": "backend"}},
    "ingress": [{"fromEndpoints": [{"matchLabels": {"role": "frontend"}}]}]
},{
    "labels": [{"key": "name", "value": "l7-rule"}],
    "description": "GET of one path",
    "endpointSelector": {"matchLabels": {"any:app": "myService"}},
    "ingress": [{
        "fromEndpoints": [{"matchLabels": {"env": "prod"}}, {"matchLabels": {"reserved:host": ""}}],
        "toPorts": [{
            "ports": [{"port": "80", "protocol": "tcp"}],
            "rules": {"http": [{"method": "GET", "path": "/public"}]}
        }]
    }]
}]
"""
BARE_FLOWS = [
    ("default/front", "default/back", 80, "TCP", {}, True),
    ("default/service", "default/back", 80, "TCP", {}, False),
    ("default/prod", "default/service", 80, "TCP", {"http": HTTP_GET}, True),
    ("default/prod", "default/service", 80, "TCP", {"http": HTTP_PUT}, False),
    ("default/dev", "default/service", 80, "TCP", {"http": HTTP_GET}, False),
]
