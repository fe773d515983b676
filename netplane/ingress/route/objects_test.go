package route_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/ingress/route"
)

var epoch = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)

// about is the metadata of an object that is seconds old at epoch.
func about(name string, seconds int) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: "shop", Name: name, CreationTimestamp: metav1.NewTime(epoch.Add(time.Duration(seconds) * time.Second))}
}

// service is one with one port and endpoints.
func service(o *route.Objects, name string, addrs ...string) *corev1.Service {
	port, portName, ready := int32(8080), "http", true
	svc := &corev1.Service{ObjectMeta: about(name, 0), Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: portName, Port: 80}}}}
	slice := &discoveryv1.EndpointSlice{ObjectMeta: about(name, 0), AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &portName, Port: &port}}}
	slice.Labels = map[string]string{discoveryv1.LabelServiceName: name}
	for _, a := range addrs {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
	}
	o.Services, o.Slices = append(o.Services, svc), append(o.Slices, slice)
	return svc
}

func backend(name string) networkingv1.IngressBackend {
	return networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: name, Port: networkingv1.ServiceBackendPort{Number: 80}}}
}

// path is of the form "=/exact", "/prefix" or "~/whatever".
func path(text, service string) networkingv1.HTTPIngressPath {
	kind := networkingv1.PathTypePrefix
	switch text[0] {
	case '=':
		kind, text = networkingv1.PathTypeExact, text[1:]
	case '~':
		kind, text = networkingv1.PathTypeImplementationSpecific, text[1:]
	}
	return networkingv1.HTTPIngressPath{Path: text, PathType: &kind, Backend: backend(service)}
}

func rule(host string, paths ...networkingv1.HTTPIngressPath) networkingv1.IngressRule {
	return networkingv1.IngressRule{Host: host, IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{Paths: paths}}}
}

func ingress(o *route.Objects, name string, age int, rules ...networkingv1.IngressRule) *networkingv1.Ingress {
	ing := &networkingv1.Ingress{ObjectMeta: about(name, -age), Spec: networkingv1.IngressSpec{Rules: rules}}
	o.Ingresses = append(o.Ingresses, ing)
	return ing
}

// secret has a certificate for hosts.
func secret(t testing.TB, o *route.Objects, name string, hosts ...string) *corev1.Secret {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: hosts, NotBefore: epoch, NotAfter: epoch.AddDate(1, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	s := &corev1.Secret{ObjectMeta: about(name, 0), Type: corev1.SecretTypeTLS, Data: map[string][]byte{
		corev1.TLSCertKey: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), corev1.TLSPrivateKeyKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
	}}
	o.Secrets = append(o.Secrets, s)
	return s
}
