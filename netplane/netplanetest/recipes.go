package netplanetest

// Who is who in most recipes: pod1 is the application's client, pod2 the application, and
// pod3 somebody of another namespace.
var (
	usual      = map[Host]string{Pod1: "shop app=client", Pod2: "shop app=api,role=web", Pod3: "other app=client,team=ops"}
	namespaces = map[string]string{"shop": "", "other": "purpose=testing"}
)

// recipes are the public recipes of network policies
// (github.com/ahmetb/kubernetes-network-policy-recipes), and what they leave out.
var recipes = []recipe{
	{
		name: "01 deny all traffic to an application", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: web-deny-all, namespace: shop}
spec: {podSelector: {matchLabels: {role: web}}, ingress: []}
`,
		allowed: []string{"pod2 pod1 tcp", "pod1 pod3 udp", "node pod2 tcp", "node pod2 udp", "node pod2 ping", "pod2 pod2 tcp", "outside pod1 tcp", "pod2 node tcp"},
		blocked: []string{"pod1 pod2 tcp", "pod1 pod2 udp", "pod1 pod2 sctp", "pod3 pod2 ping", "pod3 pod2 second", "outside pod2 tcp"},
	},
	{
		name: "02 limit traffic to an application", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: api-allow, namespace: shop}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
`,
		allowed: []string{"pod1 pod2 tcp", "pod1 pod2 udp", "pod1 pod2 sctp", "pod1 pod2 ping"},
		blocked: []string{"pod3 pod2 tcp", "pod3 pod2 ping", "outside pod2 tcp"},
	},
	{
		name: "02a allow all traffic to an application", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: web-deny-all, namespace: shop}
spec: {podSelector: {matchLabels: {role: web}}, ingress: []}
---
metadata: {name: web-allow-all, namespace: shop}
spec: {podSelector: {matchLabels: {role: web}}, ingress: [{}]}
`,
		allowed: []string{"pod1 pod2 tcp", "pod3 pod2 udp", "outside pod2 second", "pod3 pod2 sctp", "outside pod2 ping"},
	},
	{
		name: "03 deny all non-whitelisted traffic in a namespace", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: default-deny-all, namespace: shop}
spec: {podSelector: {}, ingress: []}
`,
		allowed: []string{"pod1 pod3 tcp", "node pod1 tcp"},
		blocked: []string{"pod1 pod2 tcp", "pod2 pod1 tcp", "pod3 pod1 udp", "outside pod1 tcp"},
	},
	{
		name: "04 deny traffic from other namespaces", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: deny-from-other-namespaces, namespace: shop}
spec: {podSelector: {matchLabels: {}}, ingress: [{from: [{podSelector: {}}]}]}
`,
		allowed: []string{"pod1 pod2 tcp", "pod2 pod1 udp"},
		blocked: []string{"pod3 pod2 tcp", "pod3 pod1 udp", "outside pod2 tcp"},
	},
	{
		name: "05 allow traffic from all namespaces", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: web-allow-all-namespaces, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{namespaceSelector: {}}]}]}
`,
		allowed: []string{"pod1 pod2 tcp", "pod3 pod2 tcp"},
		blocked: []string{"outside pod2 tcp", "outside pod2 ping"},
	},
	{
		name: "06 allow traffic from a namespace", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: web-allow-prod, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{namespaceSelector: {matchLabels: {purpose: testing}}}]}]}
`,
		allowed: []string{"pod3 pod2 tcp"},
		blocked: []string{"pod1 pod2 tcp", "outside pod2 tcp"},
	},
	{
		name: "07 allow traffic from some pods in another namespace", namespaces: namespaces,
		pods: map[Host]string{Pod1: "other app=client", Pod2: "shop app=api", Pod3: "other team=ops"},
		policies: `
metadata: {name: web-allow-all-ns-monitoring, namespace: shop}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: other}}, podSelector: {matchExpressions: [{key: team, operator: In, values: [ops, dev]}]}}]}]
`,
		allowed: []string{"pod3 pod2 tcp"},
		blocked: []string{"pod1 pod2 tcp", "outside pod2 tcp"},
	},
	{
		name: "08 allow external traffic", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: web-allow-external, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: []}]}
---
metadata: {name: default-deny-all, namespace: shop}
spec: {podSelector: {}}
`,
		allowed: []string{"outside pod2 tcp", "pod3 pod2 tcp"},
		blocked: []string{"outside pod1 tcp"},
	},
	{
		name: "09 allow traffic only to a port", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: api-allow-5000, namespace: shop}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress: [{ports: [{port: 8082}], from: [{podSelector: {matchLabels: {app: client}}}]}]
`,
		allowed: []string{"pod1 pod2 second"},
		blocked: []string{"pod1 pod2 tcp", "pod1 pod2 udp", "pod1 pod2 ping", "pod3 pod2 second", "outside pod2 second"},
	},
	{
		name: "10 allow traffic with multiple selectors", namespaces: namespaces,
		pods: map[Host]string{Pod1: "shop app=bookstore,role=search", Pod2: "shop app=bookstore,role=db", Pod3: "shop app=inventory,role=web"},
		policies: `
metadata: {name: redis-allow-services, namespace: shop}
spec:
  podSelector: {matchLabels: {app: bookstore, role: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: bookstore, role: search}}}, {podSelector: {matchLabels: {app: bookstore, role: api}}}, {podSelector: {matchLabels: {app: inventory, role: web}}}]}]
`,
		allowed: []string{"pod1 pod2 tcp", "pod3 pod2 tcp"},
		blocked: []string{"outside pod2 tcp"},
	},
	{
		name: "11 deny egress traffic from an application", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: foo-deny-egress, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: []}
`,
		allowed: []string{"pod2 pod1 tcp", "outside pod1 tcp", "node pod1 tcp", "pod1 pod1 tcp", "pod3 pod1 ping"},
		blocked: []string{"pod1 pod2 tcp", "pod1 outside tcp", "pod1 pod3 udp", "pod1 node tcp", "pod1 pod2 sctp", "pod1 outside ping"},
	},
	{
		// DNS is what pod2 serves here, at its port for UDP.
		name: "11a allow egress only to DNS", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: foo-deny-egress, namespace: shop}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress: [{ports: [{port: 8081, protocol: UDP}]}]
`,
		allowed: []string{"pod1 pod2 udp", "pod1 outside udp", "pod1 node udp"},
		blocked: []string{"pod1 pod2 tcp", "pod1 outside tcp", "pod1 node tcp"},
	},
	{
		name: "12 deny all non-whitelisted traffic from a namespace", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: default-deny-all-egress, namespace: shop}
spec: {podSelector: {}, policyTypes: [Egress], egress: []}
`,
		allowed: []string{"pod3 pod2 tcp", "outside pod1 tcp"},
		blocked: []string{"pod1 pod2 tcp", "pod2 pod3 udp", "pod2 outside tcp"},
	},
	{
		name: "14 deny external egress traffic", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: foo-deny-external-egress, namespace: shop}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress: [{ports: [{port: 8081, protocol: UDP}]}, {to: [{namespaceSelector: {}}]}]
`,
		allowed: []string{"pod1 pod2 tcp", "pod1 pod3 sctp", "pod1 outside udp"},
		blocked: []string{"pod1 outside tcp", "pod1 outside ping", "pod1 node tcp"},
	},
	{
		name: "blocks with exceptions", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: but-one, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{ipBlock: {cidr: "ALL", except: ["POD3"]}}]}]}
---
metadata: {name: only-out, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: "OUTSIDE"}}]}]}
`,
		allowed: []string{"outside pod2 tcp", "outside pod2 ping", "pod1 outside tcp", "node pod2 udp"},
		blocked: []string{"pod3 pod2 tcp", "pod1 pod2 tcp", "pod1 node tcp", "pod1 pod3 tcp"},
	},
	{
		name: "a client from outside by its own address", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: outside, namespace: shop}
spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "OUTSIDE"}}, {podSelector: {matchLabels: {app: nobody}}}]}]}
`,
		allowed: []string{"outside pod2 tcp", "outside pod1 udp"},
		blocked: []string{"pod1 pod2 tcp", "pod3 pod2 udp"},
	},
	{
		name: "ranges of ports and protocols", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: ranged, namespace: shop}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress: [{ports: [{port: 8081, endPort: 9000}, {protocol: SCTP}]}]
`,
		allowed: []string{"pod1 pod2 second", "pod3 pod2 sctp", "outside pod2 sctp"},
		blocked: []string{"pod1 pod2 tcp", "pod1 pod2 udp"},
	},
	{
		name: "names of ports, of the subject and of its peers", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: named-in, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{ports: [{port: second}, {port: udp, protocol: UDP}, {port: udp}]}]}
---
metadata: {name: named-out, namespace: other}
spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: second}]}]}
---
metadata: {name: named-out, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{ports: [{port: second}, {port: udp, protocol: UDP}]}]}
`,
		allowed: []string{"pod1 pod2 second", "pod1 pod2 udp", "pod3 pod2 second", "pod3 pod1 second", "outside pod2 udp"},
		blocked: []string{"pod1 pod2 tcp", "pod3 pod2 udp", "pod1 pod3 second", "pod1 outside second", "outside pod2 tcp"},
	},
	{
		name: "both directions have to agree", pods: usual, namespaces: namespaces,
		policies: `
metadata: {name: in, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, policyTypes: [Ingress, Egress], ingress: [{from: [{namespaceSelector: {}}]}]}
---
metadata: {name: out, namespace: other}
spec: {podSelector: {}, egress: [{to: [{podSelector: {}}]}]}
`,
		allowed: []string{"pod1 pod2 tcp"},
		blocked: []string{"pod3 pod2 tcp", "pod2 pod1 tcp", "pod2 outside udp", "pod1 pod3 tcp"},
	},
}
