package api

// AnnotationNetworks of a Node says on which networks it stands, such as 192.0.2.0/24, with
// commas between them. Its agent sets it.
const AnnotationNetworks = "net.decree.dev/networks"
