{{- define "finetune.selector" -}}
app.kubernetes.io/name: finetune-operator
{{- if ne .Values.fullnameOverride "finetune-operator" }}
app.kubernetes.io/instance: {{ .Values.fullnameOverride }}
{{- end }}
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end }}

{{- define "finetune.serviceAccount" -}}
{{ .Values.serviceAccount.name | default .Values.fullnameOverride }}
{{- end }}

{{- define "finetune.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- $name := printf "%s/%s" .Values.image.registry .Values.image.repository -}}
{{- if .Values.image.digest }}{{ $name }}@{{ .Values.image.digest }}{{ else }}{{ $name }}:{{ $tag }}{{ end }}
{{- end }}

{{- define "finetune.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "finetune.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}

{{/* Rules of rights.yaml, which is made from the operator's own table. */}}
{{- define "finetune.rules" -}}
{{ index (.root.Files.Get "files/rights.yaml" | fromYaml) .part | toYaml }}
{{- end }}

{{/* True while a live cluster does not serve FinetuneRuntimes yet: Helm looks all kinds up before it makes the first
object, so runtimes cannot come with their definition. `helm template` asks no cluster and gets them. */}}
{{- define "finetune.runtimesLater" -}}
{{- if and .Values.runtimes (not (.Capabilities.APIVersions.Has "finetune.dev/v1alpha1/FinetuneRuntime")) (lookup "v1" "Namespace" "" "kube-system") }}true{{ end }}
{{- end }}
