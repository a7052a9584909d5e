// qcnText writes a value as a literal, and says whether it has one.
func qcnText(value interface{}) (string, bool) {
	if value == nil {
		return "nil", true
	}
	if err, ok := value.(error); ok {
		return fmt.Sprintf("error %q", err.Error()), true
	}
	return fmt.Sprintf("%#v", value), qcnPlain(reflect.ValueOf(value))
}

func qcnPlain(value reflect.Value) bool {
	kind := value.Type()
	if kind.PkgPath() != "" {
		return false
	}
	switch kind.Kind() {
	case reflect.Bool, reflect.String, reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return true
	case reflect.Float32, reflect.Float64:
		return value.Float()-value.Float() == 0
	case reflect.Slice, reflect.Array:
		for i := 0; i < value.Len(); i++ {
			if !qcnPlain(value.Index(i)) {
				return false
			}
		}
		return qcnPlain(reflect.Zero(kind.Elem()))
	case reflect.Map:
		for _, key := range value.MapKeys() {
			if !qcnPlain(key) || !qcnPlain(value.MapIndex(key)) {
				return false
			}
		}
		return qcnPlain(reflect.Zero(kind.Key())) && qcnPlain(reflect.Zero(kind.Elem()))
	}
	return false
}
