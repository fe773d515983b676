package api

// AnnotationWireGuard of a Node is its agent's public key for WireGuard (Curve25519, 32
// bytes in base64); without it, packets to pods of that node are not encrypted.
const AnnotationWireGuard = "net.decree.dev/wireguard-key"
